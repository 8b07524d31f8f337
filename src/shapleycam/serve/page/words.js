// What the page says about numbers.

export const UTILITIES = {
  rest: "The logit of the class plus the logarithm of its probability: what speaks for it, and against the others.",
  logit: "The logit of the class alone, whatever the others have.",
  probability: "The probability of the class.",
  log_probability: "The logarithm of the probability of the class.",
};

export function percent(probability) {
  const value = 100 * probability;
  return value > 0 && value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
}

export function about(model) {
  const classes = model.classes ? `, ${model.classes} classes` : "";
  return `A map over a photograph: warm where it speaks for a class. The network is ${model.network ?? "an exported program"}${classes}.`;
}

const ROWS = ["upper", "middle", "lower"];
const COLUMNS = ["left", "centre", "right"];

// Where a signed map is strongest, for those who do not see it.
export function placeInWords(map) {
  let best = -Infinity;
  let at = [0, 0];
  map.forEach((row, y) =>
    row.forEach((value, x) => {
      if (value > best) [best, at] = [value, [y, x]];
    }),
  );
  if (!(best > 0)) return "Nothing in the picture speaks for it.";
  const third = (index, length) => Math.min(2, Math.floor((3 * (index + 0.5)) / length));
  const [row, column] = [ROWS[third(at[0], map.length)], COLUMNS[third(at[1], map[0].length)]];
  if (row === "middle" && column === "centre") return "It is strongest in the centre.";
  return `It is strongest in the ${row} ${column}.`;
}

function number(value) {
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(2);
}

// The completeness gap: how much of what the class has gained the map leaves unaccounted for.
export function gapInWords(one, answer) {
  const gap = one.completeness_gap;
  if (gap === undefined || gap === null) return ["", "This method has no completeness gap: its map is not an account of the utility."];
  const gain = one.utility_gain;
  if (gain === undefined || gain === null || Math.abs(gain) < 1e-6) {
    return ["", `Completeness gap: ${number(gap)}, in units of the utility “${answer.utility}”. At 0 the attributions add up to it.`];
  }
  const share = Math.abs(gap / gain);
  const part = `${Math.round(100 * share)} %`;
  const verdict =
    share <= 0.05
      ? "The map adds up."
      : share <= 0.25
        ? "The map nearly adds up."
        : share <= 1
          ? "The map adds up in part."
          : "The map does not add up: read its places, not its size.";
  return [
    verdict,
    ` Against an empty layer the picture changes the utility of “${one.label}” by ${number(gain)}; ` +
      `the attributions account for ${number(gain - gap)}, and the completeness gap is ${number(gap)} (${part}).`,
  ];
}
