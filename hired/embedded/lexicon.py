"""The closed words of the painted world, and the open ones that its signs carry."""

from __future__ import annotations

import random

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (238, 210, 40),
    "purple": (145, 55, 185),
    "orange": (242, 135, 25),
    "black": (22, 22, 24),
    "white": (246, 246, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
ROWS = ("top", "middle", "bottom")
COLS = ("left", "center", "right")
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MAX_GLYPHS = 6

# Half of the words stand only on signs that no training step sees: reading them is reading, not recall.
_LIST = """
    ACORN ALARM ALLEY ANGEL APPLE APRON ARROW ATLAS BACON BADGE BAKER BANJO BARN BASIL BEACH BEAR BELL
    BENCH BIKE BIRD BISON BOAT BONE BOOK BOOT BOWL BREAD BRICK BROOM BRUSH CABIN CABLE CAFE CAKE CAMEL
    CANAL CANDY CANOE CARGO CEDAR CHAIR CHALK CHEF CHERRY CIDER CIRCUS CLAY CLIFF CLOCK CLOUD CLOVER
    COAST COBRA COCOA COFFEE COIN COMET CORAL COTTON CRANE CREEK CROWN DAIRY DAISY DELTA DEPOT DESK
    DINER DOCK DOVE DRAGON DRUM DUCK EAGLE EASEL ECHO ELBOW EMBER EXIT FABRIC FALCON FARM FERN FERRY
    FIELD FLAG FLOUR FLUTE FOREST FORK FOX FROST FRUIT GALAXY GARDEN GATE GINGER GLASS GLOBE GLOVE GOAT
    GOLF GRAPE GUITAR HABIT HARBOR HAT HAWK HAZEL HERON HIVE HONEY HOTEL HOUSE ICON IRIS ISLAND IVORY
    JACKET JAZZ JELLY JEWEL JUICE JUNGLE KAYAK KETTLE KEY KING KITE KIWI KOALA LADDER LAGOON LAMP LAUREL
    LEMON LIBRARY LILY LION LLAMA LOBBY LOTUS LUNCH MAGNET MAIL MANGO MAPLE MARKET MEADOW MELON METRO
    MILK MINT MIRROR MOON MOTEL MUFFIN MUSEUM NECTAR NEST NOODLE NORTH OASIS OCEAN OLIVE ONION OPERA
    ORCHID OTTER OWL PALACE PANDA PAPER PARK PEACH PEARL PENCIL PEPPER PIANO PILOT PINE PIXEL PIZZA
    PLAZA PLUM POLAR POND PONY PUZZLE QUARTZ QUEEN QUILT RABBIT RADIO RAFT RANCH RAVEN RIVER ROBIN
    ROCKET ROSE SADDLE SALAD SALT SAUCE SCHOOL SEVEN SHELF SHIP SILK SMOKE SOCKS SOUP SPICE SPOON STABLE
    STAMP STONE SUGAR SUNSET TABLE TAXI TEMPLE THYME TIGER TOAST TRAIN TULIP TUNNEL TURTLE VALLEY VELVET
    VIOLET WAFFLE WAGON WALNUT WATER WHALE WHEAT WILLOW WINDOW WOLF YACHT YARN ZEBRA ZINC
"""
WORDS = tuple(_LIST.split())
SEEN_WORDS = tuple(word for word in WORDS[0::2] if len(word) <= MAX_GLYPHS)
UNSEEN_WORDS = tuple(word for word in WORDS[1::2] if len(word) <= MAX_GLYPHS)

_LETTERS = GLYPHS[:26]


def training_text(rng: random.Random) -> str:
    """A sign's text for training: mostly letters without rhyme or reason, some seen words and numbers.

    Letters that a language model could guess from each other teach it to guess: with three in ten words seen
    and three in ten pronounceable, it read a quarter of the unseen words and three quarters of the others.
    """
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(SEEN_WORDS)
    if kind < 0.2:
        return str(rng.randint(0, 10 ** rng.randint(1, 4) - 1))
    alphabet = GLYPHS if kind < 0.3 else _LETTERS
    return "".join(rng.choice(alphabet) for _ in range(rng.choice((2, 3, 4, 4, 5, 5, 5, 6, 6))))


def held_out_text(rng: random.Random) -> str:
    """A sign's text for testing: always a word that no training step has seen."""
    return rng.choice(UNSEEN_WORDS)
