"""A small closed English lexicon of what captions name, by kind; nothing is downloaded.

Groups stand between commas, with `|` between words that a picture cannot tell apart ("man|guy"): a word is never taken
for another one of its group, and a group that any caption of an image names counts as being in it. The choice of words
is ours; they are what captions of photographs, and of `toy_world`, mostly name. `reading.py` finds them in a caption.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal


def words(listed: str) -> frozenset[str]:
    """Words between blanks."""
    return frozenset(listed.split())


NOUNS = {
    "anybody": "person, child|kid|toddler|baby|infant",
    "person": "man|guy|gentleman, woman|lady, boy, girl",
    "role": "skier, surfer, skateboarder, snowboarder, batter, catcher, umpire, chef|cook, police officer|policeman, "
    "soldier, cyclist, bride, groom",
    "animal": "dog|puppy, cat|kitten|kitty, horse|pony, cow|bull|calf, sheep|lamb, goat, elephant, bear, zebra, "
    "giraffe, bird, duck, goose, seagull, parrot, owl, chicken, monkey, rabbit, lion, tiger, deer, pig, fish, turtle",
    "vehicle": "car|automobile, truck, bus, train, motorcycle|motorbike, bicycle|bike, airplane|plane|jet|aircraft, "
    "boat, ship, van, taxi|cab, tractor, scooter, helicopter, trolley, cart, wagon, kayak",
    "street": "traffic light|stop light|stoplight, stop sign, street sign, fire hydrant|hydrant, parking meter, bench, "
    "street light|lamp post, fence, mailbox, pole, statue, fountain, flag",
    "furniture": "table, chair, couch|sofa, bed, desk, shelf|bookshelf, cabinet|cupboard, dresser, stool, lamp, rug, "
    "curtain, mirror, clock, toilet, sink, bathtub|tub, shower, fireplace, crib",
    "device": "television|tv, laptop, computer, monitor, keyboard, mouse, phone|cell phone|cellphone, remote, camera, "
    "microwave, oven|stove, toaster, refrigerator|fridge, blender, fan, radio, speaker, hair dryer",
    "tableware": "plate|dish, bowl, cup|mug, glass, bottle, fork, knife, spoon, pot, pan, tray, jar, vase, "
    "napkin, basket, box, bucket, candle",
    "food": "pizza, sandwich, hot dog, hamburger|burger, cake, donut|doughnut, cookie, apple, banana, orange, carrot, "
    "tomato, salad, egg, pie, pancake, waffle, taco, burrito, lemon, strawberry, pear, peach, mushroom, onion, potato",
    "food (mass)": "bread, rice, cheese, meat, soup, broccoli, pasta, bacon, chocolate, fruit, ice cream, coffee, tea, "
    "beer, wine, milk, juice, lettuce",
    "clothing": "shirt|t-shirt, jacket|coat, hat, cap, helmet, dress, skirt, suit, tie|necktie, scarf, shoe, boot, "
    "glove, sock, sweater, uniform, backpack, handbag|purse, suitcase, umbrella, apron, vest, watch, belt, wig, mask",
    "sport": "ball, bat, tennis racket|racket|racquet, frisbee, kite, skateboard, surfboard, snowboard, ski, baseball, "
    "basketball, soccer ball, football, net, paddle, trophy",
    "thing": "book, newspaper, magazine, toy, teddy bear|stuffed animal, doll, balloon, pillow, blanket, towel, "
    "toothbrush, guitar, piano, drum, picture|painting, poster, bag, ladder, rope, bell, pen, pencil, key, coin, ring, "
    "crown, sword, hammer, scissors",
    "plant": "tree, bush|shrub, flower|blossom, rose, leaf, cactus, sunflower, palm tree, log, branch",
    "building": "building, house|home, church, tower, barn, bridge, hotel, castle, tent, shed, skyscraper, lighthouse, "
    "store|shop, restaurant, garage",
    "room": "kitchen, bathroom, bedroom, living room, office, classroom, hallway, dining room, library, museum, gym",
    "ground": "street|road, sidewalk, beach, field, park, mountain|hill, river, lake, ocean|sea, forest|woods, desert, "
    "parking lot, yard, garden, pond, swimming pool|pool, playground, farm, harbor, runway, highway",
    "cover": "grass, snow, sand, water, mud, ice, dirt, gravel",
    "part": "door, window, wall, floor, roof, ceiling, stair, balcony, porch, counter, chimney",
    "shape": "circle, square, triangle, star, cross, heart, moon, arrow, cube, sphere, cylinder, cone, hexagon, oval",
}
"""Kind → groups of nouns, singular."""

ADJECTIVES = {
    "colour": "red, orange, yellow, green, blue, purple|violet, pink, brown, black, white, gray|grey, golden|gold, "
    "silver, teal, maroon, tan|beige",
    "pattern": "striped, dotted|spotted, checkered|plaid, plain, floral",
    "size": "tiny|small|little, huge|big|large|giant|enormous, medium-sized",
    "length": "long, short",
    "height": "tall|high, low",
    "width": "wide, narrow",
    "count": "double, triple, single",
    "state": "broken, bent, melted, sliced, folded, torn",
    "openness": "open, closed|shut",
    "fullness": "empty, full",
    "wetness": "wet, dry",
    "cleanness": "clean, dirty|muddy",
    "age": "young, old|elderly",
    "newness": "new|modern, vintage|antique|old-fashioned, rusty",
    "material": "wooden, metal|metallic|steel, plastic, leather, stone, brick, glass, paper, rubber, concrete, ceramic",
    "form": "round|circular, rectangular, triangular, oval-shaped",
    "light": "dark, bright",
    "mood": "happy|smiling, sad, angry",
    "weather": "sunny, cloudy|overcast, rainy, snowy, foggy",
    "place": "left-hand, right-hand",
}
"""Kind → groups of adjectives."""

FREE = frozenset({"colour", "pattern", "size", "count", "state"})
"""Kinds of adjectives that a thing of any kind may have, so that they change places among each other too."""

RELATIONS = {
    "on|on top of|atop": "under",
    "under|underneath|beneath": "on top of",
    "above": "below",
    "below": "above",
    "left of|to the left of|on the left of": "right of",
    "right of|to the right of|on the right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
    "inside|inside of": "outside of",
    "outside|outside of": "inside of",
}
"""What is said → what is false then; "to the" or "on the" before left and right stays."""

COVERS = {
    "bird": {"duck", "goose", "seagull", "parrot", "owl", "chicken"},
    "car": {"taxi", "van"},
    "truck": {"van"},
    "boat": {"ship", "kayak"},
    "building": {
        "house",
        "church",
        "tower",
        "barn",
        "hotel",
        "castle",
        "shed",
        "skyscraper",
        "lighthouse",
        "store",
    }
    | {"restaurant", "garage"},
    "ball": {"baseball", "basketball", "soccer ball", "football"},
    "bag": {"handbag", "backpack"},
    "toy": {"doll", "teddy bear"},
    "tree": {"palm tree"},
    "flower": {"rose", "sunflower"},
    "plate": {"tray"},
    "computer": {"laptop", "monitor"},
    "fruit": {"apple", "banana", "orange", "lemon", "strawberry", "pear", "peach"},
    "hat": {"cap", "helmet"},
    "uniform": {"suit"},
    "book": {"magazine"},
    "field": {"park", "farm", "yard", "garden"},
    "water": {"river", "lake", "ocean", "pond"},
    "circle": {"ring", "ball", "oval", "moon"},
    "square": {"box"},
    "golden": {"yellow", "orange", "tan"},
    "brown": {"tan", "maroon"},
    "gray": {"silver"},
    "blue": {"teal"},
    "green": {"teal"},
    "red": {"maroon", "pink"},
}
"""Group → others that one thing may be as well: neither is said in place of the other."""

SYMMETRIC = words("and or with near by beside alongside , a an the next to")
"""Words that say the same of two things in either order, when nothing else stands between them."""

IRREGULAR = {
    "man": "men", "gentleman": "gentlemen", "woman": "women", "lady": "ladies", "child": "children", "sheep": "sheep",
    "fish": "fish", "deer": "deer", "goose": "geese", "mouse": "mice", "leaf": "leaves", "knife": "knives",
    "shelf": "shelves", "bookshelf": "bookshelves", "calf": "calves", "scissors": "scissors", "cactus": "cacti",
    "policeman": "policemen", "aircraft": "aircraft", "woods": "woods", "person": "people", "teddy bear": "teddy bears",
}  # fmt: skip

OPENERS = words(
    "a an the this that these those his her their its my your our some any no one two three "
    "four five six seven eight nine ten several many few both all each every another other of "
    "in on at with without by from near and or to into onto over through across along around "
    "between beside against toward towards like as is are has have having for off past down "
    "up next atop while there"
)
"""Words after which a noun or its adjectives may begin."""

VERB_LIKE = words(
    "ski skis watch watches cook cooks bat bats park parks tie ties shop shops store stores "
    "fish duck ducks dress dresses train trains cross crosses star stars ring rings fan fans "
    "book books paddle paddles box boxes picture pictures clock clocks skateboards snowboards "
    "surfboards bear bears"
)
"""Nouns that are a verb more often right after another noun: a man skis."""

Role = Literal["noun", "adjective", "relation", "word"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A word of the lexicon.

    Attributes:
        role: what it is.
        kind: what it may be exchanged for; of a relation, what is false then.
        group: first word of its group.
        lemma: singular.
        plural: is it one.

    """

    role: Role
    kind: str
    group: str
    lemma: str
    plural: bool = False


def plural_of(noun: str) -> str:
    """More than one of it.

    >>> [plural_of(noun) for noun in ("bus", "berry", "stop sign", "police officer", "toy")]
    ['buses', 'berries', 'stop signs', 'police officers', 'toys']
    """
    *before, last = noun.split(" ")
    if last in IRREGULAR:
        many = IRREGULAR[last]
    elif re.search(r"(s|x|z|ch|sh|tomato|potato)$", last):
        many = f"{last}es"
    elif re.search(r"[^aeiou]y$", last):
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return " ".join([*before, many])


@cache
def lexicon() -> Mapping[str, tuple[Entry, ...]]:
    """Word, in lower case → what it may be: one entry, or an adjective's and a noun's."""
    found: dict[str, list[Entry]] = {}
    for kind, listed in ADJECTIVES.items():
        for words in _groups(listed):
            for word in words:
                found.setdefault(word, []).append(Entry("adjective", kind, words[0], word))
    for kind, listed in NOUNS.items():
        for words in _groups(listed):
            for word in words:
                found.setdefault(word, []).append(Entry("noun", kind, words[0], word))
                if (many := plural_of(word)) != word:
                    found.setdefault(many, []).append(Entry("noun", kind, words[0], word, True))
    for said, false in RELATIONS.items():
        for word in said.split("|"):
            found.setdefault(word, []).append(Entry("relation", false, said.split("|")[0], word))
    return {word: tuple(entries) for word, entries in found.items()}


def _groups(listed: str) -> list[list[str]]:
    return [group.strip().split("|") for group in listed.split(",")]


@cache
def near(group: str) -> frozenset[str]:
    """The group, and all others that one thing may belong to as well.

    >>> sorted(near("truck"))
    ['truck', 'van']
    """
    covering = {wide for wide, narrow in COVERS.items() if group in narrow}
    return frozenset({group, *covering, *COVERS.get(group, ())})
