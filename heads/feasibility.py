"""Word vectors of a cache's attributes and objects, for the feasibility of pairs (eval/feasibility.py).

    text/pooled    g(a) = mean of the normalised embeddings of all prompts of a in the cache, minus the mean of all
                   prompts; g(o) likewise. Every backbone with a joint space has it; build with open-world prompts.
    word/states    a language model's states of the bare words (LLaVA): normed, averaged over tokens, then over parts.
    a GloVe file   see eval/glove.py.

Differs from CompCos and CSP, which read GloVe: averages of prompts are our choice. The common part is taken out because
prompts of one template all point the same way, which would leave the grid of thresholds a narrow range.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from cache_builder import FeatureCache
from cache_builder.datasets.base import CompositionTask
from cache_builder.records import read_t7
from eval.feasibility import Feasibility, feasibility
from eval.glove import UT_ZAPPOS, glove
from heads.base import Needs
from heads.errors import ConfigError, TaskError
from heads.source import check_streams
from heads.words import word_states

WORDS = ("text/pooled", "word/states")
"""Streams that hold what words mean, in the order in which they are tried."""


PROMPTS = 1 << 14
"""Embeddings of prompts held at once."""


def feasibility_of(
    cache: FeatureCache, *, words: str | None = None, glove_file: Path | None = None
) -> Feasibility:
    """Feasibility of every attr × obj of a cache's czsl task, from training pairs and word vectors.

    Args:
        cache: with a czsl task; only its texts are read, and none of its images.
        words: a stream of `WORDS`; None takes the first that the cache holds.
        glove_file: a GloVe text file instead.

    Raises:
        TaskError: no czsl task.
        MissingStream: the cache lacks the stream; names the command that builds one with it.
        ScoreTableError: the file is malformed or lacks words.

    """
    task = _task(cache)
    if glove_file is not None:
        replaced = UT_ZAPPOS if cache.spec.dataset.name == "ut_zappos" else None
        attrs, objs = (glove(glove_file, names, replaced) for names in (task.attrs, task.objs))
        source = f"GloVe file {glove_file.name}"
    else:
        held = next((s for s in WORDS if s in cache.streams), WORDS[0])
        stream = words or held
        if stream not in WORDS:
            raise ConfigError(f"no word vectors in {stream!r}; choose one of {', '.join(WORDS)}")
        check_streams(cache, Needs(frozenset(), frozenset({stream})), "feasibility")
        attrs, objs = (_prompts if stream == "text/pooled" else _states)(cache, task)
        backbone = cache.spec.backbone
        source = f"{stream} of {backbone.family}:{backbone.checkpoint}"
    place = [{w: i for i, w in enumerate(names)} for names in (task.attrs, task.objs)]
    train = np.array([(place[0][a], place[1][o]) for a, o in task.pairs["train"]], dtype=np.int64)
    return Feasibility(
        feasibility(attrs, objs, train.reshape(-1, 2)), task.attrs, task.objs, source
    )


def published(path: Path, cache: FeatureCache) -> Feasibility:
    """A public `feasibility_*.pt`, `{"feasibility": tensor}`, attribute-major over a cache's words; never executed.

    Raises:
        DatasetError: the file cannot be read without running it.
        ConfigError: it holds something else.
        ScoreTableError: another number of values, or one that is not finite.

    """
    found = read_t7(path)
    values = found.get("feasibility") if isinstance(found, dict) else None
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        raise ConfigError(f"{path} is no {{'feasibility': float tensor}}, as CSP publishes it")
    task = _task(cache)
    return Feasibility(values.flatten().float().numpy(), task.attrs, task.objs, f"file {path.name}")


def _task(cache: FeatureCache) -> CompositionTask:
    task = cache.tasks.czsl
    if task is None:
        raise TaskError(f"{cache.place} has no czsl task, so no pairs that could be feasible")
    return task


def _prompts(
    cache: FeatureCache, task: CompositionTask
) -> tuple[Float[np.ndarray, "a d"], Float[np.ndarray, "o d"]]:
    """Means over the prompts of each word, without what all have in common; a lone word has nothing else."""
    pairs = sorted(task.prompts)
    rows = cache.rows("text", [task.prompts[pair] for pair in pairs])
    places = [{word: i for i, word in enumerate(words)} for words in (task.attrs, task.objs)]
    index = [
        np.array([place[word] for word in column])
        for place, column in zip(places, zip(*pairs, strict=True), strict=True)
    ]
    dim = cache.shape("text/pooled")[0]
    sums = [np.zeros((len(words), dim)) for words in (task.attrs, task.objs)]
    for start in range(0, len(rows), PROMPTS):
        part = slice(start, start + PROMPTS)
        unique, back = np.unique(rows[part], return_inverse=True)
        pooled = np.asarray(cache.read("text/pooled", unique), dtype=np.float64)[back]
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        for total, at in zip(sums, index, strict=True):
            np.add.at(total, at[part], pooled)
    common = sums[0].sum(0) / len(rows)
    attrs, objs = (
        total / np.bincount(at)[:, None] - (common if len(total) > 1 else 0)
        for total, at in zip(sums, index, strict=True)
    )
    return attrs, objs


def _states(
    cache: FeatureCache, task: CompositionTask
) -> tuple[Float[np.ndarray, "a v"], Float[np.ndarray, "o v"]]:
    """One vector a word from a language model's states."""
    attrs = word_states(cache, [f"attr:{word}" for word in task.attrs]).numpy()
    return attrs, word_states(cache, [f"obj:{word}" for word in task.objs]).numpy()
