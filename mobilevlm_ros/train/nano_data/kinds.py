"""Kinds of things and of places, for questions that name the kind: which animal, what room, indoors or outdoors."""

from __future__ import annotations

__all__ = ['GENERIC', 'GROUNDS', 'INDOORS', 'OUTDOORS', 'WHICH']

GROUNDS = {
    'blanket', 'building', 'carpet', 'curtain', 'desk', 'door', 'fence', 'field', 'floor', 'grass', 'leaf', 'mountain',
    'paper', 'road', 'rock', 'sand', 'sea', 'sky', 'snow', 'table', 'tablecloth', 'tree', 'wall', 'water', 'window',
}  # fmt: skip
"""What other things stand on or before: not what a picture is of, if anything else is in it."""
WHICH = {
    'animal': {
        'bear', 'bee', 'bird', 'buffalo', 'butterfly', 'camel', 'cat', 'cheetah', 'chicken', 'cow', 'crab', 'deer',
        'dog', 'dolphin', 'donkey', 'duck', 'eagle', 'elephant', 'fish', 'flamingo', 'fox', 'frog', 'giraffe', 'goat',
        'hedgehog', 'hippopotamus', 'horse', 'insect', 'kangaroo', 'leopard', 'lion', 'lizard', 'monkey', 'mouse',
        'owl', 'panda', 'parrot', 'peacock', 'penguin', 'pig', 'pigeon', 'rabbit', 'raccoon', 'rhinoceros', 'seal',
        'sheep', 'snake', 'squirrel', 'swan', 'tiger', 'turtle', 'whale', 'wolf', 'zebra',
    },
    'insect': {
        'bee', 'beetle', 'butterfly', 'dragonfly', 'grasshopper', 'ladybird', 'spider',
    },
    'kind of food': {
        'bread', 'cake', 'cheese', 'chocolate', 'cookie', 'donut', 'egg', 'fish', 'hamburger', 'ice cream', 'meat',
        'pancake', 'pasta', 'pizza', 'rice', 'salad', 'sandwich', 'soup', 'steak', 'waffle',
    },
    'kind of building': {
        'castle', 'church', 'hotel', 'house', 'lighthouse', 'skyscraper', 'temple', 'tower', 'windmill',
    },
    'fruit': {
        'apple', 'banana', 'cherries', 'grapes', 'lemon', 'orange', 'pear', 'pineapple', 'strawberry',
    },
    'piece of furniture': {
        'armchair', 'bed', 'bench', 'bookcase', 'cabinet', 'chair', 'desk', 'sofa', 'stool', 'table', 'wardrobe',
    },
    'vegetable': {
        'broccoli', 'carrot', 'corn', 'garlic', 'lettuce', 'pepper', 'potato', 'pumpkin', 'tomato',
    },
    'vehicle': {
        'airplane', 'bicycle', 'boat', 'bus', 'canoe', 'car', 'helicopter', 'motorcycle', 'scooter', 'ship', 'tractor',
        'train', 'tram', 'tricycle', 'truck', 'van',
    },
    'tool': {
        'hammer', 'ladder', 'saw', 'scissors', 'screwdriver', 'shovel', 'wrench',
    },
    'device': {
        'camera', 'clock', 'computer', 'computer mouse', 'drone', 'headphones', 'keyboard', 'laptop', 'microphone',
        'monitor', 'phone', 'printer', 'speaker', 'tablet', 'television', 'watch',
    },
}  # fmt: skip
"""By the word that questions use, the nouns that could answer."""
GENERIC = ('animal', 'insect', 'fruit', 'vegetable', 'vehicle')
"""Kinds whose word stands for a thing of it: "is there a vehicle?", "what colour is the animal?"."""
INDOORS = {
    'bathroom', 'bedroom', 'cafe', 'classroom', 'corridor', 'dining room', 'garage', 'gym', 'home', 'hotel room',
    'kitchen', 'library', 'living room', 'meeting room', 'office', 'restaurant', 'room', 'shop', 'warehouse',
    'workshop',
}  # fmt: skip
OUTDOORS = {
    'beach', 'city', 'desert', 'field', 'forest', 'garden', 'lake', 'mountains', 'park', 'parking lot', 'river',
    'road', 'sea', 'snow', 'street',
}  # fmt: skip
