"""The procedural world: what it draws, what it says about it, and the CLIP that was trained on it."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from cache_builder import load_backbone
from cache_builder.datasets import toy_world
from cache_builder.demo.alt_text import SYNONYMS, alt_text
from cache_builder.demo.contrasts import CATEGORIES, EDITS, SWAP_REPLACE, draw_contrast, draw_edit
from cache_builder.demo.draw import IMAGE_SIZE, render
from cache_builder.demo.measure_bias import measure
from cache_builder.demo.measure_captions import measure as measure_captions
from cache_builder.demo.pretraining import training_scene
from cache_builder.demo.statements import CONVERSE, Statement, caption, describe, is_true
from cache_builder.demo.train_towers import encode_text
from cache_builder.demo.world import (
    ATTRS,
    OBJS,
    PAIR_ATTRS,
    RELATIONS,
    WORLD_VERSION,
    key_rng,
    pairs_of,
    sample_scene,
    sample_two,
)
from cache_builder.records import DatasetError

GOLDEN = Path(__file__).parent / "golden" / "toy_world.json"
CLIP = Path(toy_world.__file__).parents[1] / "demo" / "clip"
SCALE = 0.1


@pytest.fixture(scope="module")
def dataset():
    return toy_world.load(seed=5, scale=SCALE)


@pytest.fixture(scope="module")
def scenes():
    return toy_world.scenes_of(seed=5, scale=SCALE)


def parse(text: str) -> Statement:
    """Read a caption back, independently of how it was made."""
    text = text.removeprefix("there is ")
    relation = next((r for r in CONVERSE if f" {r} " in text), None)
    parts = re.split(rf" {relation} | and ", text) if relation else text.split(" and ")
    words = [part.split()[1:] for part in parts]
    return Statement(tuple((w[0] if len(w) == 2 else None, w[-1]) for w in words), relation)


def test_the_world_is_as_wide_as_promised():
    assert len(PAIR_ATTRS) >= 14
    assert len(ATTRS) >= 4
    assert len(OBJS) >= 14
    assert not {*PAIR_ATTRS} & {*OBJS}
    assert {*SYNONYMS} == {*PAIR_ATTRS, *OBJS}


def test_held_out_pairs_are_disjoint_and_every_primitive_stays_in_training():
    train, val, test = (set(pairs_of(part)) for part in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test
    assert train | val | test == set(pairs_of("all"))
    assert 0.2 < len(val | test) / len(pairs_of("all")) < 0.3
    assert min(sum(a == attr for a, _ in train) for attr in PAIR_ATTRS) >= 10
    assert min(sum(o == obj for _, o in train) for obj in OBJS) >= 10
    assert {a for a, _ in val} == {a for a, _ in test} == set(PAIR_ATTRS)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(dataset):
    again, other = toy_world.load(seed=5, scale=SCALE), toy_world.load(seed=6, scale=SCALE)
    assert dataset.digest() == again.digest() != other.digest()
    for first, second in list(zip(dataset.images, again.images, strict=True))[::60]:
        assert first.open().tobytes() == second.open().tobytes()
    assert dataset.images[0].open().tobytes() != other.images[0].open().tobytes()


def test_an_item_does_not_depend_on_how_many_others_are_drawn(dataset):
    small = toy_world.load(seed=5, scale=0.03)
    pictures = {record.id: record for record in dataset.images}
    for record in small.images[::25]:
        assert record.open().tobytes() == pictures[record.id].open().tobytes()
    assert set(pairs_and_items(small)) <= set(pairs_and_items(dataset))


def pairs_and_items(dataset):
    """Matching items of both kinds, with one image and with two."""
    return (*dataset.tasks.matching, *dataset.tasks.two_by_two)


def test_pictures_are_small_rgb_and_their_openers_travel_between_processes(dataset):
    record = pickle.loads(pickle.dumps(dataset.images[3]))
    assert record.open().mode == "RGB"
    assert record.open().size == (IMAGE_SIZE, IMAGE_SIZE)


def test_every_id_resolves_and_is_unique(dataset):
    images, texts = [r.id for r in dataset.images], [r.id for r in dataset.texts]
    assert len(set(images)) == len(images)
    assert len(set(texts)) == len(texts)
    tasks = dataset.tasks
    used = {e.image for e in (*tasks.czsl.examples, *tasks.retrieval)}
    used |= {i for e in pairs_and_items(dataset) for i in e.images}
    used |= {i for e in tasks.composed for i in (e.reference, *e.targets)}
    assert used == set(images)
    said = {c for e in (*pairs_and_items(dataset), *tasks.retrieval) for c in e.captions}
    assert said | {t for e in tasks.composed for t in e.modifications} | set(
        tasks.czsl.prompts.values()
    ) == set(texts)


def test_every_task_and_category_is_there_in_every_split(dataset):
    assert dataset.tasks.kinds == ("czsl", "matching", "two_by_two", "retrieval", "composed")
    for split in ("train", "val", "test"):
        assert {e.category for e in dataset.tasks.matching if e.split == split} == set(CATEGORIES)
        assert {e.category for e in dataset.tasks.two_by_two if e.split == split} == set(
            SWAP_REPLACE
        )
        assert {c for e in dataset.tasks.composed for c in e.categories if e.split == split} == set(
            EDITS
        )
    assert type(dataset.tasks).from_json(dataset.tasks.to_json()) == dataset.tasks


def test_compositions_show_their_label_and_half_of_the_test_pairs_are_unseen(dataset, scenes):
    task = dataset.tasks.czsl
    seen = set(task.pairs["train"])
    assert len(task.candidates("test", "open")) == len(PAIR_ATTRS) * len(OBJS) == len(task.prompts)
    for e in task.examples:
        assert scenes[e.image].graph == (((e.attr, e.obj),), None)
        assert e.split != "train" or (e.attr, e.obj) in seen
    for split in ("val", "test"):
        unseen = [(e.attr, e.obj) not in seen for e in task.examples if e.split == split]
        assert np.mean(unseen) == pytest.approx(0.5, abs=0.02)
        assert {(e.attr, e.obj) for e in task.examples if e.split == split} - seen <= set(
            pairs_of(split)
        )


def test_captions_are_true_of_their_image_and_false_of_the_other(dataset, scenes):
    for e in pairs_and_items(dataset):
        first, second = map(parse, e.captions)
        assert is_true(first, scenes[e.images[0]]), e
        assert not is_true(second, scenes[e.images[0]]), e
        if len(e.images) == 2:
            assert is_true(second, scenes[e.images[1]]), e
            assert not is_true(first, scenes[e.images[1]]), e
    for e in dataset.tasks.retrieval:
        assert all(is_true(parse(text), scenes[e.image]) for text in e.captions)


def test_the_two_scenes_of_an_item_share_no_layout(dataset, scenes):
    for e in pairs_and_items(dataset):
        if len(e.images) == 2:
            first, second = (scenes[image] for image in e.images)
            assert first.grain != second.grain
            assert {(t.x, t.y, t.radius) for t in first.things}.isdisjoint(
                (t.x, t.y, t.radius) for t in second.things
            )


def test_a_swap_keeps_the_words_and_a_replacement_changes_one(dataset):
    for e in pairs_and_items(dataset):
        true, false = (
            sorted(w for w in text.split() if w not in {"a", "an"}) for text in e.captions
        )
        if e.category.startswith("swap"):
            assert true == false
        elif e.category in {"replace_att", "replace_obj"}:
            assert len(set(true) ^ set(false)) == 2


def test_novelty_does_not_tell_the_true_caption(dataset):
    train = set(pairs_of("train"))
    for e in pairs_and_items(dataset):
        novel = [len({pair for pair in parse(text).said if pair[0]} - train) for text in e.captions]
        assert novel[0] == novel[1], e
        assert (novel[0] > 0) == ("/unseen/" in e.id), e
        assert e.split != "train" or novel == [0, 0]


def test_composed_targets_show_what_the_edit_asks_for(dataset, scenes):
    train = set(pairs_of("train"))
    for e in dataset.tasks.composed:
        graphs = {scenes[target].graph for target in e.targets}
        assert len(graphs) == 1, e
        before, after = dict(scenes[e.reference].graph[0]), dict(next(iter(graphs))[0])
        gone, come = before.items() - after.items(), after.items() - before.items()
        expected = {"add": (0, 1), "remove": (1, 0)}.get(e.categories[0], (1, 1))
        assert (len(gone), len(come)) == expected, e
        assert all(f"{attr} {obj}" in e.modifications[0] for attr, obj in gone), e
        assert (not set(after.items()) <= train) == ("/unseen/" in e.id), e
        gallery = {
            i
            for other in dataset.tasks.composed
            if other.split == e.split
            for i in (other.reference, *other.targets)
        }
        assert {i for i in gallery if scenes[i].graph in graphs} == set(e.targets), e


def test_truth_follows_the_scene_graph():
    scene = sample_scene(key_rng(0, "truth", 0), (("red", "ring"), ("bent", "key")), "above")
    assert is_true(parse("a bent key below a red ring"), scene)
    assert is_true(parse("a ring above a bent key"), scene)
    assert is_true(parse("a bent key and a red ring"), scene)
    for lie in (
        "a red ring below a bent key",
        "a red key above a bent ring",
        "a red ring left of a bent key",
    ):
        assert not is_true(parse(lie), scene)
    assert not is_true(parse("a red ring above a bent key and a blue cup"), scene)
    assert parse(caption(describe(scene))) == describe(scene)


@pytest.mark.parametrize("category", ["add_everything"])
def test_an_unknown_category_or_edit_names_the_known_ones(category):
    with pytest.raises(ValueError, match="swap_att"):
        draw_contrast(key_rng(0, "x", 0), category, "train", False)
    with pytest.raises(ValueError, match="substitute_obj"):
        draw_edit(key_rng(0, "x", 0), category, "train", False)


def test_pretraining_sees_train_pairs_only_and_says_less_than_it_shows():
    train, mentioned = set(pairs_of("train")), []
    for i in range(300):
        scene, texts = training_scene(3, i)
        assert {thing.pair for thing in scene.things} <= train
        assert all(texts)
        full = caption(describe(scene))
        mentioned += [text == full for text in texts]
    assert np.mean(mentioned) < 0.1
    # An alt-text names no primitive that the scene lacks.
    rng = key_rng(0, "alt", 0)
    for _ in range(200):
        scene = sample_scene(rng, sample_two(rng, pairs_of("train")), "above")
        absent = {*PAIR_ATTRS, *OBJS} - {word for thing in scene.things for word in thing.pair}
        assert not absent & set(re.findall(r"[a-z]+", alt_text(rng, scene)))


def test_renders_match_the_golden_digests():
    golden = json.loads(GOLDEN.read_text())
    assert golden["world_version"] == WORLD_VERSION, (
        "renders changed with the version: renew the golden file"
    )
    assert golden["renders"] == golden_renders()


def golden_renders() -> dict[str, str]:
    found = {}
    for i, pair in enumerate(pairs_of("all")):
        scene = sample_scene(key_rng(0, "golden", i), (pair,))
        found.setdefault(pair[0], hashlib.sha256()).update(render(scene).tobytes())
    for i, relation in enumerate(RELATIONS):
        rng = key_rng(0, "golden-two", i)
        scene = sample_scene(rng, sample_two(rng, pairs_of("all")), relation)
        found[relation] = hashlib.sha256(render(scene).tobytes())
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}


def test_a_root_without_its_file_is_refused_and_the_miniature_loads(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"toy_world\.json"):
        toy_world.load(tmp_path)
    small = toy_world.load(toy_world.miniature(tmp_path / "mini"))
    assert len(small.images) < 200
    assert small.tasks.kinds == ("czsl", "matching", "two_by_two", "retrieval", "composed")


def test_any_string_has_tokens_and_the_end_has_the_largest_id():
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    ids = tokenizer(["", "a red circle", "Ünïcode 漢字 \U0001f511", "word " * 99])
    assert ids.shape == (4, 32)
    assert (ids.max(dim=1).values == ids.max()).all()
    assert len(set(ids.argmax(dim=1).tolist())) == 4
    assert (ids[0, 2:] == 0).all()


def test_the_bundled_clip_loads_offline_and_beats_chance(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    ids = open_clip.get_tokenizer(f"local-dir:{CLIP}")(
        ["a red circle", "a bent key left of a huge moon"]
    )
    assert isinstance(model, open_clip.CLIP)
    torch.testing.assert_close(
        encode_text(model, ids), model.encode_text(ids), atol=1e-5, rtol=1e-5
    )
    found = measure(CLIP, seed=9, split="val", scale=SCALE)
    assert found["czsl/open/pair_acc"] > 20 * found["czsl/open/chance"]
    assert found["2x2/replace_att/i2t"] > 0.7


@pytest.mark.parametrize("family", ["siglip2", "pe"])
def test_the_other_bundled_towers_beat_chance(family):
    found = measure(CLIP.parent / family, seed=9, split="val", scale=SCALE)
    assert found["czsl/open/pair_acc"] > 5 * found["czsl/open/chance"]
    assert found["2x2/replace_att/i2t"] > 0.5


def test_the_bundled_llava_s_captions_tell_pictures_apart():
    found = measure_captions(seed=9, split="val", scale=SCALE)
    assert found["2x2/replace_obj/i2t"] > 0.6
    assert found["2x2/swap_obj/group_score"] > 1 / 6


def test_the_bundled_llava_s_tower_is_the_bundled_clip_s():
    """LLaVA keeps CLIP's tower frozen: on equal pixels its patches are what enters CLIP's last block."""
    clip, llava = load_backbone("clip:demo"), load_backbone("llava:demo")
    picture = render(sample_scene(key_rng(0, "tower", 0), (pairs_of("train")[0],)))
    pixels = clip.preprocess(picture)[None]
    torch.testing.assert_close(llava.preprocess(picture)[None], pixels, atol=1e-6, rtol=0)
    states = clip.encode_images(pixels, (3,))["block_3"]
    ours = llava.encode_images(pixels)
    torch.testing.assert_close(torch.cat([ours["prefix"], ours["patches"]], 1), states)


def test_the_bundled_backbones_are_small():
    """Together at most 16 MB in the wheel."""
    files = [
        f for name in ("clip", "siglip2", "pe", "llava") for f in (CLIP.parent / name).iterdir()
    ]
    assert sum(f.stat().st_size for f in files) < 16 * 2**20


def test_an_unknown_key_in_the_marker_is_an_error(tmp_path):
    (tmp_path / "toy_world.json").write_text('{"sede": 3}')
    with pytest.raises(DatasetError, match="seed and scale, and nothing else"):
        toy_world.load(tmp_path)


@pytest.mark.parametrize("options", [{"scale": -1}, {"scale": "abc"}, {"seed": -1}, {"seed": True}])
def test_a_size_or_seed_that_is_none_is_an_error(tmp_path, options):
    (tmp_path / "toy_world.json").write_text(json.dumps(options))
    with pytest.raises(DatasetError, match="it must be"):
        toy_world.load(tmp_path)
