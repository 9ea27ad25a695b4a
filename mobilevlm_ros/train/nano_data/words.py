"""The nouns and colours that nano learns, and what the questions need to know of them.

A catalogue name or a caption becomes one of these nouns or is not used. Nouns that could stand for the same thing are
never asked about as absent when the other is there; nouns of one family make hard negatives.
"""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = [
    'HEIGHTS_M',
    'MASS',
    'PEOPLE',
    'PLURAL_ONLY',
    'article',
    'clash',
    'family',
    'joined',
    'noun_of',
    'plural',
]

PEOPLE = frozenset(('man', 'woman', 'boy', 'girl', 'person', 'child', 'baby'))
PLURAL_ONLY = frozenset(
    ('scissors', 'pants', 'shoes', 'cherries', 'grapes', 'glasses', 'sunglasses', 'headphones', 'leaves', 'jeans')
)
_WITHOUT_ARTICLE = {'mountains', 'snow'}
MASS = PLURAL_ONLY | {
    'corn', 'broccoli', 'garlic', 'lettuce', 'bread', 'grass', 'sand', 'water', 'snow', 'coffee', 'tea', 'paper',
    'food', 'soap', 'sky', 'cheese', 'meat', 'rice', 'salad', 'pasta', 'fruit', 'butter', 'honey', 'wine', 'beer',
    'milk', 'juice',
}  # fmt: skip
"""Nouns without an article."""

# Pattern on the lower-case name, noun; the first that matches counts, an empty noun means: do not use.
_RULES = [
    (re.compile(pattern), noun)
    for pattern, noun in (
        (r'mannequin|doll|\btoy|game|table tennis|tennis bat|model|house|\bnet\b|goal|sofa bz|rocking|dollhouse', ''),
        (r'fireman|^male$|sitting male|holding male', 'man'),
        (r'female', 'woman'),
        (r'\bboy\b', 'boy'),
        (r'\bgirl\b', 'girl'),
        (r'teddy|edward bear', 'teddy bear'),
        (r'armchair', 'armchair'),
        (r'wheelchair', 'wheelchair'),
        (r'stool', 'stool'),
        (r'chair|seat$', 'chair'),
        (r'table fan|fan$', 'fan'),
        (r'desk lamp|lamp(?!post)|hanging light|wall light', 'lamp'),
        (r'bench', 'bench'),
        (r'tablet|table with|technical table|changing|pool table|dressing|bedside|bathmat|bed pan', ''),
        (r'table', 'table'),
        (r'dog|dingo', 'dog'),
        (r'sofa|couch', 'sofa'),
        (r'\bbed\b', 'bed'),
        (r'wardrobe', 'wardrobe'),
        (r'bookcase|shelves', 'bookcase'),
        (r'tv cabinet|tv stand|television cabinet|remote', ''),
        (r'cabinet|cupboard|dresser', 'cabinet'),
        (r'cooktop|stove|cooker', 'stove'),
        (r'microwave', 'microwave'),
        (r'oven', 'oven'),
        (r'refrigerator|fridge|freezer', 'refrigerator'),
        (r'washing machine|dryer', 'washing machine'),
        (r'toilet paper|toilet brush|toilets?”', ''),
        (r'toilet', 'toilet'),
        (r'washbasin|^sink', 'sink'),
        (r'bathtub|^bath$|island bath', 'bathtub'),
        (r'screen door|shower door|glass door|curtain$', ''),
        (r'\bdoor\b', 'door'),
        (r'window(?! blind| shutter)', 'window'),
        (r'\btv\b|flat tv', 'television'),
        (r'laptop|ibook', 'laptop'),
        (r'imac', 'computer'),
        (r'keyboard', 'keyboard'),
        (r'mobile phone|iphone|^phone', 'phone'),
        (r'clock', 'clock'),
        (r'\bbook\b', 'book'),
        (r'desk', 'desk'),
        (r'christmas tree|alien', ''),
        (r'decorative plant|^plant$|ficus|yucca|little plant|indoor plant|spathi|succulent|bamboo', 'plant'),
        (r'vase', 'vase'),
        (r'coffee cup|plastic cup|mug|^cup$', 'cup'),
        (r'bottle|flacon', 'bottle'),
        (r'drinking glass|^glass$|beer glass|glass of water|cocktail', 'glass'),
        (r'bowl', 'bowl'),
        (r'^plate$|oval plate', 'plate'),
        (r'beetle$|sedan|sports car|peugeot|renault|ford focus|seat leon|chevrolet|suv|smart car|race car', 'car'),
        (r'dumper|apc|stryker', ''),
        (r'fire truck|garbage truck|pickup truck|truck', 'truck'),
        (r'\bbus\b', 'bus'),
        (r'tricycle', 'tricycle'),
        (r'bicycle|^bike$', 'bicycle'),
        (r'motorbike|yamaha', 'motorcycle'),
        (r'airplane|biplane', 'airplane'),
        (r'sail|rowboat', 'boat'),
        (r'balloon', 'balloon'),
        (r'recycling|dustbin|trash ?can|garbage can|wheelie|compost bin', 'trash can'),
        (r'cardboard box|^box$|crate', 'box'),
        (r'suitcase', 'suitcase'),
        (r'backpack', 'backpack'),
        (r'umbrella', 'umbrella'),
        (r'radiator', 'radiator'),
        (r'piano', 'piano'),
        (r'guitar', 'guitar'),
        (r'violin|cello', 'violin'),
        (r'drum', 'drum'),
        (r'scissors', 'scissors'),
        (r'highlighting|erase marker|text marker|pencil', 'pen'),
        (r'hammer|mallet', 'hammer'),
        (r'wrench', 'wrench'),
        (r'\bsaw\b', 'saw'),
        (r'\bkeys?\b', 'key'),
        (r'screwdriver', 'screwdriver'),
        (r'shovel|spade', 'shovel'),
        (r'ladder', 'ladder'),
        (r'\bknife\b(?! stand)', 'knife'),
        (r'\bspoon\b', 'spoon'),
        (r'\bfork\b(?! lift)', 'fork'),
        (r'teapot', 'teapot'),
        (r'kettle', 'kettle'),
        (r'toaster', 'toaster'),
        (r'lightbulb', 'light bulb'),
        (r'camera(?!.*surv)', 'camera'),
        (r'fedora|hat\b|sombrero|baseball cap|^cap$', 'hat'),
        (r'shirt', 'shirt'),
        (r'jacket', 'jacket'),
        (r'glove', 'glove'),
        (r'sock\b', 'sock'),
        (r'trousers|pants', 'pants'),
        (r'sneakers|woman shoes|mocassin', 'shoes'),
        (r'watch', 'watch'),
        (r'basketball|soccer ball|tennis ball|cricket ball|football', 'ball'),
        (r'racket', 'racket'),
        (r'traffic cone|^cone$', 'traffic cone'),
        (r'red light|yellow light|green light', 'traffic light'),
        (r'“stop”', 'stop sign'),
        (r'mailbox|post box|letters box', 'mailbox'),
        (r'fire hydrant', 'fire hydrant'),
        (r'extinguisher', 'fire extinguisher'),
        (r'fireplace', 'fireplace'),
        (r'pineapple', 'pineapple'),
        (r'apple|grannysmith', 'apple'),
        (r'orange\.|an orange', 'orange'),
        (r'lemon', 'lemon'),
        (r'banana', 'banana'),
        (r'pear\.', 'pear'),
        (r'strawberry', 'strawberry'),
        (r'cherries', 'cherries'),
        (r'grapes', 'grapes'),
        (r'tomato', 'tomato'),
        (r'potato', 'potato'),
        (r'carrot', 'carrot'),
        (r'corn\.', 'corn'),
        (r'broccoli', 'broccoli'),
        (r'lettuce', 'lettuce'),
        (r'pumpkin', 'pumpkin'),
        (r'yellow pepper|green pepper', 'pepper'),
        (r'onion', 'onion'),
        (r'garlic', 'garlic'),
        (r'mushroom|\bcep\b', 'mushroom'),
        (r'pizza', 'pizza'),
        (r'hamburger', 'hamburger'),
        (r'cake', 'cake'),
        (r'bread$', 'bread'),
        (r'roasted', ''),
        (r'chicken|rooster|\bhen\b', 'chicken'),
        (r'penguin', 'penguin'),
        (r'duck|drake|gander', 'duck'),
        (r'owl\.', 'owl'),
        (r'rosella|blackbird|crow|cuckoo|lark|magpie|pigeon|lorikeet|gull|vulture|toucan|heron|crane|ostrich', 'bird'),
        (r'frog', 'frog'),
        (r'fish|grouper|groper|trout|wrasse', 'fish'),
        (r'\bbee\b|hornet|hoverfly|\bfly\b|grasshopper|mantis', 'insect'),
        (r'chimp|gorilla|tamarin', 'monkey'),
        (r'bear', 'bear'),
        (r'\bcow\b|bull\b|zebu|yak', 'cow'),
        (r'goat', 'goat'),
        (r'sheep|\bram\b', 'sheep'),
        (r'camel|dromedary', 'camel'),
        (r'lion\.|a lion', 'lion'),
        (r'tiger', 'tiger'),
        (r'caribou|deer|doe|wapiti', 'deer'),
        (r'\bfox\b', 'fox'),
        (r'elephant', 'elephant'),
        (r'donkey', 'donkey'),
        (r'horse', 'horse'),
        (r'zebra', 'zebra'),
        (r'giraffe', 'giraffe'),
        (r'\bpig\b', 'pig'),
        (r'rhino', 'rhinoceros'),
        (r'rabbit', 'rabbit'),
        (r'mouse|\brat\b', 'mouse'),
        (r'squirrel', 'squirrel'),
        (r'kangaroo', 'kangaroo'),
        (r'\bcat\b', 'cat'),
        (r'hedgehog|echidna', 'hedgehog'),
        (r'palm|birch|oak|tree\b|poplar|cypress|maple|\bpine\b|acacia|sycamore', 'tree'),
        (r'flower|daffodil|rose|iris|marigold|hibiscus|petunia|tulip|lily', 'flower'),
    )
]

_SAME = [
    {'chair', 'armchair', 'wheelchair', 'stool', 'bench'},
    {'sofa', 'armchair', 'bench'},
    {'bird', 'chicken', 'duck', 'penguin', 'owl'},
    {'bicycle', 'tricycle', 'motorcycle'},
    {'plant', 'flower', 'tree', 'vase'},
    {'desk', 'table'},
    {'bookcase', 'cabinet', 'wardrobe'},
    {'computer', 'laptop', 'television', 'keyboard'},
    {'glass', 'cup', 'vase', 'bottle', 'bowl'},
    {'stove', 'oven', 'microwave'},
    {'man', 'boy', 'person'},
    {'woman', 'girl', 'person'},
    {'box', 'suitcase', 'cabinet'},
    {'door', 'window', 'wardrobe'},
    {'violin', 'guitar'},
    {'donkey', 'horse', 'cow', 'zebra'},
    {'car', 'truck'},
    {'sink', 'bathtub', 'bowl'},
    {'teapot', 'kettle'},
    {'pizza', 'plate'},
    {'watch', 'clock'},
    {'spoon', 'fork', 'knife'},
    {'building', 'house', 'church', 'tower', 'hotel', 'castle', 'skyscraper', 'temple', 'city'},
    {'tree', 'plant', 'flower', 'leaf', 'leaves', 'bush', 'forest', 'grass', 'field', 'branch', 'palm tree'},
    {'sea', 'lake', 'water', 'river', 'pool', 'fountain', 'waterfall'},
    {'mountain', 'rock', 'hill', 'mountains', 'cliff', 'stone'},
    {'bag', 'backpack', 'suitcase', 'handbag', 'basket'},
    {'bed', 'pillow', 'blanket', 'sofa', 'carpet', 'curtain'},
    {'shelf', 'bookcase', 'cabinet', 'cupboard', 'drawer'},
    {'road', 'street', 'bridge', 'path'},
    {'shirt', 'jacket', 'dress', 'coat', 'suit', 'jeans', 'pants'},
    {'glasses', 'sunglasses'},
    {'leopard', 'cheetah'},
    {'truck', 'van', 'car', 'jeep'},
    {'monitor', 'television', 'computer', 'screen'},
    {'coffee', 'tea', 'cup', 'mug', 'drink'},
    {'glass', 'wine', 'beer', 'juice', 'milk', 'water', 'drink'},
    {'child', 'baby', 'boy', 'girl'},
    {'hat', 'cap', 'helmet'},
    {'motorcycle', 'scooter', 'moped'},
    {'boat', 'ship', 'canoe', 'kayak', 'surfboard'},
    {'picture', 'painting', 'mirror', 'poster', 'frame'},
    {'mouse', 'computer mouse', 'rat'},
    {'pen', 'pencil', 'brush', 'marker'},
]

_GENERIC = {
    'food': {
        'bread', 'cake', 'sandwich', 'hamburger', 'pizza', 'salad', 'meat', 'fruit', 'vegetable', 'plate', 'bowl',
        'rice', 'pasta', 'soup', 'egg', 'cheese', 'fish', 'apple', 'tomato',
    },
    'fruit': {'apple', 'orange', 'lemon', 'pear', 'banana', 'strawberry', 'grapes', 'cherries', 'pineapple', 'tomato'},
    'vegetable': {'tomato', 'carrot', 'potato', 'broccoli', 'lettuce', 'pepper', 'onion', 'corn', 'pumpkin', 'garlic'},
    'tool': {'hammer', 'wrench', 'saw', 'screwdriver', 'scissors', 'knife', 'shovel', 'drill', 'axe', 'pliers'},
    'insect': {'bee', 'butterfly', 'spider', 'beetle', 'dragonfly', 'ladybird'},
    'bird': {'parrot', 'pigeon', 'eagle', 'gull', 'swan', 'peacock', 'flamingo'},
    'toy': {'teddy bear', 'doll', 'robot', 'ball', 'car', 'truck'},
    'person': {'child', 'baby', 'boy', 'girl', 'man', 'woman'},
    'furniture': {'chair', 'armchair', 'sofa', 'table', 'desk', 'cabinet', 'wardrobe', 'bookcase', 'bed', 'stool'},
}  # fmt: skip
"""Words for many kinds of things, and those kinds."""

_FAMILIES = [
    {'chair', 'armchair', 'sofa', 'stool', 'bench', 'bed', 'table', 'desk', 'wheelchair', 'lamp', 'plant'},
    {'wardrobe', 'bookcase', 'cabinet', 'refrigerator', 'door', 'window', 'oven', 'stove', 'washing machine'},
    {'car', 'truck', 'bus', 'bicycle', 'motorcycle', 'airplane', 'boat', 'tricycle'},
    {'man', 'woman', 'boy', 'girl', 'dog', 'cat', 'teddy bear', 'person'},
    {'cup', 'bottle', 'glass', 'bowl', 'plate', 'vase', 'teapot', 'kettle', 'lamp', 'plant', 'book', 'spoon'},
    {'television', 'laptop', 'computer', 'keyboard', 'phone', 'clock', 'book', 'camera', 'watch', 'cup', 'pen'},
    {'apple', 'orange', 'lemon', 'pear', 'tomato', 'banana', 'strawberry', 'pepper', 'ball', 'carrot', 'potato'},
    {'dog', 'cat', 'horse', 'cow', 'sheep', 'pig', 'rabbit', 'deer', 'fox', 'lion', 'tiger', 'bear', 'goat'},
    {'bird', 'chicken', 'duck', 'penguin', 'owl', 'fish', 'frog', 'insect'},
    {'hammer', 'wrench', 'saw', 'screwdriver', 'scissors', 'pen', 'key', 'knife', 'spoon', 'fork', 'shovel'},
    {'hat', 'shirt', 'jacket', 'glove', 'sock', 'pants', 'shoes', 'backpack', 'umbrella', 'suitcase', 'box'},
    {'tree', 'flower', 'plant', 'mushroom'},
    {'toilet', 'sink', 'bathtub', 'radiator', 'mailbox', 'traffic cone', 'traffic light', 'stop sign', 'trash can'},
]

_PLURALS = {
    'man': 'men', 'woman': 'women', 'person': 'people', 'knife': 'knives', 'mouse': 'mice', 'sheep': 'sheep',
    'fish': 'fish', 'deer': 'deer', 'box': 'boxes', 'bus': 'buses', 'glass': 'glasses', 'bench': 'benches',
    'watch': 'watches', 'strawberry': 'strawberries', 'fox': 'foxes', 'toothbrush': 'toothbrushes',
    'potato': 'potatoes', 'tomato': 'tomatoes', 'child': 'children', 'leaf': 'leaves', 'wolf': 'wolves',
    'butterfly': 'butterflies', 'shelf': 'shelves', 'baby': 'babies', 'brush': 'brushes', 'dress': 'dresses',
}  # fmt: skip

HEIGHTS_M = {
    'man': 1.75, 'woman': 1.68, 'boy': 1.3, 'girl': 1.3, 'chair': 0.9, 'armchair': 0.9, 'stool': 0.6, 'bench': 0.8,
    'table': 0.75, 'desk': 0.76, 'sofa': 0.85, 'bed': 0.8, 'wardrobe': 2.0, 'bookcase': 1.8, 'cabinet': 1.0,
    'stove': 0.9, 'oven': 0.9, 'refrigerator': 1.7, 'washing machine': 0.85, 'toilet': 0.8, 'bathtub': 0.6,
    'door': 2.0, 'plant': 0.9, 'lamp': 1.2, 'trash can': 0.6, 'radiator': 0.6, 'piano': 1.2, 'wheelchair': 0.9,
    'dog': 0.5, 'cat': 0.35, 'car': 1.5, 'truck': 2.4, 'bus': 2.8, 'bicycle': 1.0, 'motorcycle': 1.1,
    'tricycle': 0.6, 'suitcase': 0.6, 'box': 0.4, 'backpack': 0.5, 'fire extinguisher': 0.6, 'fire hydrant': 0.8,
    'traffic cone': 0.6, 'ladder': 2.0, 'teddy bear': 0.4, 'fireplace': 1.1, 'guitar': 1.0, 'ball': 0.25,
    'horse': 1.7, 'cow': 1.5, 'sheep': 0.9, 'goat': 0.9, 'chicken': 0.4, 'tree': 3.0,
}  # fmt: skip
"""Heights of what stands on a floor or a street, in metres; what is not here is small enough for a table, or alone."""


@lru_cache(maxsize=4096)
def noun_of(name: str) -> str | None:
    """The noun for a catalogue name or a caption; None: it is not used."""
    lowered = name.lower().strip()
    return next((noun or None for pattern, noun in _RULES if pattern.search(lowered)), None)


def plural(noun: str) -> str:
    """Several of them."""
    return _PLURALS.get(noun, noun if noun in MASS else f'{noun}s')


def article(phrase: str) -> str:
    """The phrase with ``a`` or ``an``, if it takes one."""
    if phrase.split()[-1] in MASS | _WITHOUT_ARTICLE:
        return phrase
    return f'{"an" if phrase[0] in "aeiou" else "a"} {phrase}'


def joined(parts: list[str]) -> str:
    """``a, b and c``."""
    return ' and '.join([', '.join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def clash(one: str, other: str) -> bool:
    """Whether something that is one could be called the other."""
    generic = other in _GENERIC.get(one, ()) or one in _GENERIC.get(other, ())
    return one == other or generic or any(one in group and other in group for group in _SAME)


def family(noun: str) -> set[str]:
    """Nouns that are easily taken for this one, or stand where it does."""
    return {other for group in _FAMILIES if noun in group for other in group} - {noun}
