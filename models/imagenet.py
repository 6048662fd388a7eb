"""The 1,000 classes of ImageNet in plain words: a tabby is a cat, an acoustic guitar a guitar.

ImageNet's challenge (Russakovsky et al. 2015) orders its animals as WordNet does, kind by kind, so that ranges of
numbers are kinds. Where no kind is given here, a class is called by the last word of its name.
"""

from functools import cache
from pathlib import Path

import torch

# From this class on, up to the next row's, classes are of this kind; "" where their own names say it.
ANIMALS = (
    *((0, "fish"), (2, "shark"), (5, "fish"), (7, "chicken"), (9, "bird"), (25, "lizard"), (30, "frog")),
    (33, "turtle"),
    *((38, "lizard"), (49, "alligator"), (51, "dinosaur"), (52, "snake"), (69, ""), (72, "spider"), (78, "insect")),
    *((80, "bird"), (97, "duck"), (99, "goose"), (100, "swan"), (101, "elephant"), (102, "animal"), (104, "kangaroo")),
    *((105, "bear"), (106, "animal"), (107, "jellyfish"), (108, ""), (118, "crab"), (122, "lobster"), (125, "crab")),
    *((126, "insect"), (127, "bird"), (147, "whale"), (149, "seal"), (151, "dog"), (269, "wolf"), (273, "dog")),
    *((276, "animal"), (277, "fox"), (281, "cat"), (286, "leopard"), (291, "lion"), (292, "tiger"), (293, "leopard")),
    *((294, "bear"), (298, "animal"), (300, "insect"), (321, "butterfly"), (327, ""), (330, "rabbit"), (333, "animal")),
    *((335, "squirrel"), (336, "animal"), (339, "horse"), (340, "zebra"), (341, "pig"), (344, "hippo"), (345, "cow")),
    *((346, "buffalo"), (348, "sheep"), (350, "goat"), (351, "deer"), (354, "camel"), (355, "llama"), (356, "animal")),
    *((365, "monkey"), (385, "elephant"), (387, "panda"), (389, "fish"), (398, "")),
)
# Things whose names do not end in the word that people say.
THINGS = {
    **dict.fromkeys((403, 472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 871, 914), "boat"),
    **dict.fromkeys((404, 405, 726, 812, 895, 908), "plane"),
    **dict.fromkeys((407, 436, 468, 511, 609, 627, 656, 661, 734, 751, 817), "car"),
    **dict.fromkeys((466, 547, 565, 705, 820), "train"),
    **dict.fromkeys((555, 569, 586, 675, 717, 803, 864, 867), "truck"),
    **dict.fromkeys((654, 757, 779, 829, 874), "bus"),
    **dict.fromkeys((665, 670), "motorcycle"),
    **dict.fromkeys((444, 671, 870, 880), "bike"),
    **dict.fromkeys((409, 530, 892), "clock"),
    **dict.fromkeys((441, 440, 907, 737, 898), "bottle"),
    **dict.fromkeys((504, 967, 968), "cup"),
    **dict.fromkeys((526, 532, 736), "table"),
    **dict.fromkeys((423, 559, 765), "chair"),
    **dict.fromkeys((429, 430, 522, 574, 722, 768, 805, 852, 890), "ball"),
    **dict.fromkeys((527, 681, 620, 664), "computer"),
    **dict.fromkeys((487, 528, 707), "phone"),
    **dict.fromkeys((402, 546), "guitar"),
    **dict.fromkeys((579, 881), "piano"),
    **dict.fromkeys((497, 663, 668), "church"),
    **dict.fromkeys((536, 718), "dock"),
    **dict.fromkeys((564, 831), "bed"),
    **dict.fromkeys((839, 821, 888), "bridge"),
    **dict.fromkeys((970, 980), "mountain"),
    **dict.fromkeys((977, 978), "beach"),
    **dict.fromkeys((836, 837), "sunglasses"),
    **{435: "bathtub", 508: "keyboard", 548: "tv", 603: "cart", 672: "tent", 673: "mouse", 693: "paddle", 703: "bench"},
    **{704: "meter", 747: "bag", 752: "racket", 850: "bear", 851: "tv", 861: "toilet", 896: "sink", 920: "light"},
    **{430: "basketball", 805: "soccer", 852: "tennis", 928: "cream", 933: "burger", 936: "cabbage", 948: "apple"},
    **{949: "strawberry", 962: "meat", 966: "wine", 972: "cliff", 973: "coral", 975: "lake", 981: "baseball"},
    **{983: "diver", 985: "flower", 986: "flower", 987: "corn", 999: "toilet", 919: "sign", 781: "scoreboard"},
    **{934: "hotdog", 417: "balloon", 701: "parachute", 879: "umbrella", 842: "trunks", 445: "bikini", 537: "sled"},
}


@cache
def names() -> list[str]:
    """Return the name of each class, such as `tabby`, in ImageNet's order, as torchvision's weights call them."""
    return Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


@cache
def plain_words() -> list[str]:
    """Return the word that captions have for each class: its kind, or the last word of its name."""
    words = []
    for number, name in enumerate(names()):
        kind = next(kind for first, kind in reversed(ANIMALS) if number >= first)
        words.append(THINGS.get(number) or kind or name.lower().split()[-1])
    return words


@cache
def kinds() -> list[str]:
    """Return the K kinds of things among the classes: all plain words."""
    return sorted(set(plain_words()))


@cache
def kind_of_class() -> torch.Tensor:
    """Return the number of each class's kind (1000,)."""
    place = {word: number for number, word in enumerate(kinds())}
    return torch.tensor([place[word] for word in plain_words()])


def name_of_kind(kind: int, probs: torch.Tensor) -> str:
    """Return what a picture shows of a kind, given the probabilities of the classes (1000,): `school bus` rather than
    `bus` where nearly all of the kind's probability is that class's, but `cat` rather than `tabby`.
    """
    own = kind_of_class() == kind  # (1000,)
    best = int(probs.masked_fill(~own, -1).argmax())
    name, word = names()[best], kinds()[kind]
    return name if probs[best] > 0.8 * probs[own].sum() and name.lower().endswith(word) else word
