"""How far does the legacy curve read from the exact one? Same scores, two procedures, in percentage points.

    python tests/benchmarks/legacy_difference.py
    python tests/benchmarks/legacy_difference.py --seeds 3 --images 400

Synthetic images of 1,662 pairs (1,262 seen, 400 unseen, as MIT-States' test split), half of seen and half of unseen
pairs; logits are noise with the true pair raised, less where it is unseen. Numbers are legacy − exact, mean ± standard
deviation over seeds.
"""

import argparse

import numpy as np
from measure import table

from eval.composition import CompositionScores
from eval.czsl import evaluate

N_SEEN, N_UNSEEN = 1_262, 400
METRICS = ("auc", "best_hm", "best_seen", "best_unseen")


def drawn(images: int, seed: int) -> CompositionScores:
    """Scores of a model of middling quality: about 15 % auc."""
    rng = np.random.default_rng(seed)
    c, half = N_SEEN + N_UNSEEN, images // 2
    target = np.append(rng.integers(N_SEEN, size=half), rng.integers(N_SEEN, c, size=images - half))
    seen = np.arange(c) < N_SEEN
    scores = rng.normal(size=(images, c)).astype(np.float32)
    scores[:, seen] += 1
    scores[np.arange(images), target] += np.where(seen[target], 3, 2.2).astype(np.float32)
    pairs = np.stack(np.divmod(np.arange(c), 50), axis=1)
    return CompositionScores(scores, target, pairs, seen, "test", "logit")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[400, 13_000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3])
    args = parser.parse_args()
    rows: list[list[str]] = []
    for images in args.images:
        tables = [drawn(images, seed) for seed in range(args.seeds)]
        for k in args.k:
            found = [[evaluate(t, k=k, curve=c) for c in ("exact", "legacy")] for t in tables]
            cells = [f"{images:,}", str(k), f"{100 * np.mean([e['auc'] for e, _ in found]):.1f}"]
            for metric in METRICS:
                gap = [100 * (legacy[metric] - exact[metric]) for exact, legacy in found]
                cells.append(f"{np.mean(gap):+.2f} ± {np.std(gap, ddof=1):.2f}")
            rows.append(cells)
    table(["images", "k", "exact auc", *METRICS], rows)


if __name__ == "__main__":
    main()
