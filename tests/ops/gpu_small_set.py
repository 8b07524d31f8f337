"""A few calls of every CUDA kernel on awkward shapes, for compute-sanitizer; run by bench/gpu.sh, not by pytest."""

import math

import torch

from shapleycam import ops
from shapleycam.ops.shared import POOLINGS


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for n, c, s in ((1, 33, 49), (3, 300, 7), (2, 5, 130), (2, 64, 49), (1, 32, 144), (1, 9, 4096)):
            stored = [torch.rand(n, c, s, device="cuda").to(dtype) for _ in range(3)]
            last = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in stored]
            part = [t[:, : c // 2 + 1] for t in stored]  # images with a gap between them
            for a, g, h in (stored, last, part):
                for pooling in POOLINGS:
                    out = ops.weighted_reduce(a, g, h, pooling, backend="cuda")
                    expected = ops.weighted_reduce(a, g, h, pooling, backend="torch")
                    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
                ops.channel_weighted_sum(a, torch.rand(n, 2, a.shape[1], device="cuda"), backend="cuda")
        logits, weight = torch.randn(3, 1003, device="cuda").to(dtype), torch.randn(1003, 33, device="cuda").to(dtype)
        targets = torch.tensor([[0], [1002], [5]], device="cuda")
        for count in (1, 3, 32):
            for how in ({"bias": logits[0]}, {"base": logits.flip(0)}):
                rule = {"nodes": [0.3] * count, "weights": [1 / count] * count, "utility": "probability"}
                ops.utility_rows(logits, targets.expand(3, 5), backend="cuda", **rule, **how)
        for positions in (49, 4225):  # added up by the display, and before it
            a = torch.rand(3, 33, positions, device="cuda").to(dtype)
            side = math.isqrt(positions)
            ops.shapley_head(a, logits, weight, logits[0], targets, (side, side), (33, 19), backend="cuda")
    raw = torch.randn(3, 7, 5, device="cuda")
    heat = ops.display_map(raw, (19, 33), backend="cuda")
    ops.display_map(raw.view(3, 1, 7, 5), (2, 8, 9), dtype=torch.uint8, backend="cuda")
    ops.overlay(torch.rand(3, 3, 19, 33, device="cuda"), heat, backend="cuda")
    torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
