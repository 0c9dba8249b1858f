"""Run the decode kernel's text on the CPU at random points of all that it claims to serve.

The tests take points among which every two values of two axes meet; this takes as many others as
there is time for, about a second each; Ctrl-C ends it early. Prints the worst error of each dtype,
in units of a call's largest output, and each call that failed; ends with status 1 if one did.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401 (the runner and its cases are the tests')
from tqdm import tqdm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the points and their arrays (0)")
    given = parser.parse_args(arguments)
    import host_metal
    import mlx.core as mx
    from decode_case import arrays, error, run
    from decode_grid import TOLERANCES, case_of, label, random_points

    from mlx_sink.attention.kernels import decode as kernel

    errors: dict[mx.Dtype, list[float]] = {dtype: [] for dtype in TOLERANCES}
    failed = 0
    points = itertools.islice(random_points(random.Random(given.seed)), given.calls)
    mlx_metal_kernel = mx.fast.metal_kernel
    mx.fast.metal_kernel = host_metal.metal_kernel
    kernel.forget()
    try:
        for number, point in enumerate(tqdm(points, total=given.calls, unit="call")):
            case = case_of(point).with_(seed=given.seed + number)
            try:
                a = arrays(case)
                errors[case.dtype].append(error(case, a, run(case, a)))
                wrong = errors[case.dtype][-1] > TOLERANCES[case.dtype]
                said = f"off by {errors[case.dtype][-1]:.2g}"
            except (host_metal.KernelError, AssertionError) as caught:
                wrong, said = True, str(caught)
            if wrong:
                failed += 1
                print(f"{label(point)}: {said}", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        mx.fast.metal_kernel = mlx_metal_kernel
        kernel.forget()
    for dtype, found in errors.items():
        worst = f"worst error {max(found, default=0):.1e}, allowed {TOLERANCES[dtype]:.0e}"
        print(f"{str(dtype).rpartition('.')[2]:>9}: {len(found):5} calls, {worst}")
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
