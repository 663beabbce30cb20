"""Strings: their ids, which row is pooled, which rows are stored, what is cut and what is refused, in every family."""

import itertools
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from hypothesis import given, settings
from kinds import HUB, KINDS, LLAVA, OPEN_CLIP, POOLING, WHOLE

from cache_builder import build
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.backbones.tiny_files import END, IMAGE, PAD, START, llama_tokenizer
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.testing import captions

SPECIALS = {
    # kind → what its tokenizer would encode as a special token
    **dict.fromkeys((*OPEN_CLIP, "siglip2-hub", "llava-siglip"), (PAD, START, END)),
    "siglip2": (),  # canonicalize deletes brackets, so nothing can be spelt
    "siglip2-naflex": ("<pad>", "<eos>", "<bos>", "<EOS>"),
    "llava": (PAD, START, END, IMAGE),
}

ROOM = {
    # kind → longest text of one-byte tokens that is not cut
    **dict.fromkeys(("clip", "clip-eos", "clip-mobile"), 77 - 2),
    **dict.fromkeys(("pe", "pe-bare"), 48 - 2),
    **dict.fromkeys(("siglip2", *HUB), 64 - 1),
    "llava": 96 - 1,
    "llava-siglip": 96,
}


@pytest.fixture
def model(kind: str) -> Any:
    return kinds.model(kind)


def tokens(model: Any) -> Any:
    assert model.text is not None
    return model.text.tokens


every = pytest.mark.parametrize("kind", KINDS)
pooling = pytest.mark.parametrize("kind", POOLING)


@pooling
def test_capitals_do_not_change_ids(model: Any) -> None:
    a, b = model.tokenize(["A Red DRESS, don't!"]), model.tokenize(["a red dress, don't!"])
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["siglip2"])
def test_siglip2_in_open_clip_deletes_punctuation(model: Any) -> None:
    """Its published `canonicalize`; words vanish with it, so whoever works on words reads the stored ids."""
    ids = model.tokenize(["A Red_Dress, don't!", "a red dress dont", "!!", ""])
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[2], ids[3])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "siglip2"])
def test_the_others_keep_punctuation(model: Any) -> None:
    a, b = model.tokenize(["red dress!", "red dress "])
    assert not torch.equal(a, b)


@pooling
def test_ids_are_padded_on_the_right_to_the_context(kind: str, model: Any) -> None:
    ids, rule = model.tokenize(["ab", ""]), tokens(model)
    assert ids.shape == (2, model.spec.dims["context"])
    n = rule.first_free + 2
    assert (ids[0, n], ids[1, rule.first_free]) == (rule.end, rule.end)
    assert (ids[0, n + 1 :] == rule.pad).all()
    assert (ids[1, rule.first_free + 1 :] == rule.pad).all()
    assert rule.pad == (1 if kind == "clip-eos" else 0)
    if rule.start is not None:
        assert (ids[:, 0] == rule.start).all()


@pytest.mark.parametrize("kind", LLAVA)
def test_texts_and_words_of_llava_are_padded_to_the_longest_only(kind: str, model: Any) -> None:
    begin = [1] if kind == "llava" else []
    ids = model.tokenize(["ab", "abcd"])
    assert ids.shape == (2, 4 + len(begin))
    assert ids[0, -2:].tolist() == [0, 0]
    assert ids[0, : len(begin)].tolist() == begin
    assert model.lengths(ids).tolist() == [2 + len(begin), 4 + len(begin)]
    assert model.tokenize([]).shape == model.tokenize_words([]).shape == (0, 0)


@pooling
def test_the_pooled_row_is_stored_last(kind: str, model: Any) -> None:
    """Causal towers store up to the end of text, which is pooled. Towers without a mask pool the last position."""
    texts = ["ab", "", "x" * ROOM[kind], "x" * 200]
    ids, rule = model.tokenize(texts), tokens(model)
    context = model.spec.dims["context"]
    until = [2, 0, ROOM[kind], ROOM[kind]]
    if kind in ("siglip2", *HUB):
        assert rule.ends(ids).tolist() == [context - 1] * 4
        assert model.lengths(ids).tolist() == [min(n + 2, context) for n in until]
    else:
        assert rule.ends(ids).tolist() == [n + 1 for n in until]
        assert model.lengths(ids).tolist() == [n + 2 for n in until]
    assert (ids.gather(1, (rule.first_free + torch.tensor(until))[:, None]) == rule.end).all()


@every
def test_cut_texts_are_counted(kind: str, model: Any) -> None:
    room = ROOM[kind]
    texts = ["x" * room, "x" * (room + 1), "x" * 500, "a"]
    assert model.truncated(texts) == 2
    ids = model.tokenize(texts)
    assert torch.equal(ids[1], ids[2])  # what is left of them
    assert torch.equal(ids[0], ids[1])
    assert model.tokenize(["x" * 500 + "tail"]).shape[1] == model.spec.dims["context"]


@pytest.mark.parametrize(
    ("kind", "special"), [(k, s) for k, all_ in SPECIALS.items() for s in all_]
)
def test_a_text_that_spells_a_special_token_is_refused_by_name(model: Any, special: str) -> None:
    for text in (f"a {special} cat", special):
        with pytest.raises(CheckpointError, match="spells a special token") as caught:
            model.tokenize(["fine", text])
        assert repr(text) in str(caught.value)


@pytest.mark.parametrize("kind", ["siglip2"])
def test_what_canonicalize_makes_harmless_is_no_special_token(model: Any) -> None:
    assert torch.equal(
        model.tokenize(["a <pad> <END_of_text>"]), model.tokenize(["a pad end of text"])
    )


@pytest.mark.parametrize("kind", LLAVA)
def test_llava_refuses_texts_and_words_without_a_token(model: Any) -> None:
    for tokenize in (model.tokenize, model.tokenize_words):
        with pytest.raises(CheckpointError, match="text '' has no token"):
            tokenize(["fine", ""])


def test_an_unknown_word_that_looks_like_padding_is_refused() -> None:
    """Llama's tokenizers often pad with the unknown token; its rows would be taken for padding."""
    from cache_builder.backbones.llama_text import LlamaTokens

    tokenizer = llama_tokenizer(64)
    tokenizer.unk_token = PAD
    with pytest.raises(CheckpointError, match="spells a special token"):
        LlamaTokens(tokenizer, 64).tokenize(["a <pad> b"])


@pytest.mark.parametrize("kind", WHOLE)
def test_padding_takes_part_where_there_is_no_mask(model: Any) -> None:
    """The library's text tower sees all positions: another padding gives another vector, so nothing may be cut."""
    ids = model.tokenize(["a red mug"])
    other, end = ids.clone(), tokens(model).ends(ids)
    unpooled = int(model.lengths(ids)[0])
    other[0, unpooled : unpooled + 3] = 7
    embedded = [model.embed_tokens(x) for x in (ids, other)]
    a, b = (model.encode_embedded(e, end)["pooled"] for e in embedded)
    assert kinds.largest(a, b) > 1e-4


@pytest.mark.parametrize("kind", HUB)
def test_an_attention_mask_would_give_another_vector(model: Any) -> None:
    """Known to make SigLIP2's texts near random: only ids are given, as it was trained."""
    ids = model.tokenize(["a red mug"])
    whole = model.model.get_text_features(input_ids=ids).pooler_output
    masked = model.model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long())
    assert torch.equal(model.encode_texts(ids)["pooled"], whole)
    assert kinds.largest(masked.pooler_output, whole) > 1e-3


@pytest.mark.parametrize("kind", ["siglip2-naflex"])
def test_the_tokenizer_s_own_padding_side_is_ignored(model: Any) -> None:
    """transformers 5 pads this class on the left."""
    from transformers import Siglip2Tokenizer

    assert Siglip2Tokenizer.padding_side == "left"
    assert model.tokenize(["ab"])[0, 2:].tolist() == [1] + [0] * 61


@every
def test_every_id_of_a_text_has_a_string(kind: str, model: Any) -> None:
    words = model.vocabulary()
    ids = model.tokenize(["red mug"])[0, : int(model.lengths(model.tokenize(["red mug"]))[0])]
    spelt = "".join(words[int(i)] for i in ids if int(i) not in tokens(model).reserved)
    assert spelt.replace("▁", "") == "redmug"


@every
@settings(derandomize=True, deadline=None, max_examples=15)
@given(text=captions())
def test_any_caption_has_its_length_before_the_pass(kind: str, text: str) -> None:
    model = kinds.model(kind)
    ids, rule = model.tokenize([text]), tokens(model)
    length = int(model.lengths(ids)[0])
    assert int(model.encode_texts(ids)["length"][0]) == length
    real = ids[0, : length - 1] if kind in ("siglip2", *HUB) else ids[0, :length]
    assert rule.pad not in real
    assert (ids[0, length:] == rule.pad).all()


@pytest.mark.parametrize("kind", ["siglip2", *HUB])
def test_a_cache_of_siglip2_holds_the_real_ids_then_the_last_position(
    kind: str, model: Any, fast_path: Path
) -> None:
    texts = ["a red mug", "x" * 62, "x" * 63, "x" * 90]
    data = Dataset(
        name="texts",
        images=(ImageRecord("i", lambda: kinds.pictures()[0]),),
        texts=tuple(TextRecord(f"t{i}", text) for i, text in enumerate(texts)),
        tasks=Tasks(),
        decode="as made",
        counts={},
        root="nowhere",
    )
    streams = ["text/tokens", "text/pooled", "image/pooled"]
    cache = build(
        data, model, fast_path / "a.zarr", streams=streams, progress=False, storage="fp32"
    )
    ids, offsets = cache.read_ragged("text/ids")
    rows, _ = cache.read_ragged("text/tokens")
    whole = model.tokenize(texts)
    raw = model.encode_embedded(model.embed_tokens(whole), tokens(model).ends(whole))["tokens"]
    assert offsets.tolist() == [0, 11, 75, 139, 203]
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        kept = [*range(b - a - 1), 63]  # rows of the tower
        assert ids[a:b].tolist() == whole[i, kept].tolist()
        assert torch.equal(torch.from_numpy(rows[a:b]), raw[i, kept])
    for bound in offsets[1:3]:
        assert ids[bound - 2 : bound].tolist() == [1, 0]  # end of text, a pad
    for bound in offsets[3:]:
        assert ids[bound - 1] == 1  # full: the end is the last
