// Opens the page in headless Chromium with an artefact and a photograph, and prints what it found as one line of JSON:
//   node check.mjs explained.onnx photo.png [screenshot.png]
// CHROMIUM names the browser's program.

import { resolve } from "node:path";
import { chromium } from "playwright-core";
import { serve } from "./serve.mjs";

const [model, photo, screenshot] = process.argv.slice(2).map((path) => resolve(path));
const server = await serve(0, { "given.onnx": model, "given.png": photo });
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
try {
  const page = await browser.newPage({ viewport: { width: 1000, height: 640 } });
  const outside = [], errors = [];
  page.on("request", (request) => {
    const { hostname, protocol } = new URL(request.url());
    if (hostname !== "127.0.0.1" && !["data:", "blob:"].includes(protocol)) outside.push(request.url());
  });
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(`http://127.0.0.1:${server.address().port}/?model=given.onnx&photo=given.png`);
  await page.waitForFunction(() => window.loaded, null, { timeout: 300_000 });
  const read = () => page.evaluate(() => {
    const { status, result } = window.explained;
    return { status, chosen: result?.chosen, probability: result?.probabilities[result.chosen], map: result && Array.from(result.map) };
  });
  const predicted = await read();
  if (screenshot) await page.screenshot({ path: screenshot });
  if (!predicted.status.startsWith("Explained")) throw new Error(`${predicted.status} ${errors.join(" ")}`);
  await page.locator("#classes button").nth(1).click();
  await page.waitForFunction((before) => window.explained.result.chosen !== before, predicted.chosen, { timeout: 300_000 });
  console.log(JSON.stringify({ predicted, second: await read(), outside, errors }));
} finally {
  await browser.close();
  server.close();
}
