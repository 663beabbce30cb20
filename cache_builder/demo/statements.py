"""What can be said of a scene, how it reads, and whether it is true.

A statement is the content of a caption. Truth is decided on the sampled scene, never on pixels:
every thing has exactly one attribute, so "a striped house" is false of a house that is red, and of
one that is merely plain.
"""

from dataclasses import dataclass

from cache_builder.demo.world import RELATIONS, Scene

CONVERSE = RELATIONS | {converse: relation for relation, converse in RELATIONS.items()}
Said = tuple[str | None, str]
"""(attr or None, obj): None says nothing about the attribute."""


@dataclass(frozen=True, slots=True)
class Statement:
    """Things said to be there, and how the first stands to the second (None: nothing said)."""

    said: tuple[Said, ...]
    relation: str | None = None

    def turned(self) -> "Statement":
        """The same content from the other end: "a below b" for "b above a"."""
        if self.relation is None or len(self.said) != 2:
            return self
        return Statement((self.said[1], self.said[0]), CONVERSE[self.relation])


def describe(scene: Scene) -> Statement:
    """Everything a caption can say of the scene."""
    return Statement(tuple(thing.pair for thing in scene.things), scene.relation)


def is_true(statement: Statement, scene: Scene) -> bool:
    """Whether each thing said is there, each in its own place, and the relation, if one is said, holds."""
    things, relation = scene.graph
    if statement.relation is None:
        return all(any(_fits(said, pair) for pair in things) for said in statement.said)
    forward = len(things) == 2 and statement.relation == relation
    backward = relation is not None and statement.relation == RELATIONS[relation]
    order = things if forward else things[::-1] if backward else ()
    return len(order) == 2 and all(
        any(_fits(said, pair) for pair in (order[i : i + 1] if i < 2 else things))
        for i, said in enumerate(statement.said)
    )


def _fits(said: Said, pair: tuple[str, str]) -> bool:
    return said[1] == pair[1] and said[0] in {None, pair[0]}


def phrase(said: Said) -> str:
    """A thing as a noun phrase with its article: "an orange ring", "a house"."""
    words = " ".join(word for word in said if word)
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def caption(statement: Statement) -> str:
    """The plain sentence: "a red circle left of a striped house"; a third thing follows after "and"."""
    parts = [phrase(said) for said in statement.said]
    if statement.relation is None:
        return " and ".join(parts)
    return " and ".join([f"{parts[0]} {statement.relation} {parts[1]}", *parts[2:]])
