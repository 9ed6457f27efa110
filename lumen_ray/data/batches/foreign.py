"""Names of things that are in no image of a data set, as negatives beyond its own classes.

A model that is asked for a dozen classes in training, all of them common, never learns that a name may mean nothing it
has seen: asked for a thousand others later, it finds each of them somewhere. Here names come from a list of common
nouns, some with an adjective of the list or of the data set's own classes ("red bicycle"), some spliced from two nouns
into a word that does not exist ("bicyhant"), so that what is rejected are not just the words of the list.

Only for data sets whose images surely show none of it: of photographs of everyday life, most nouns may be in any.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

_ADJECTIVES = """
big small large little tall short long round flat thin thick old new wooden metal plastic glass paper leather striped
spotted dotted plain bright dark shiny wet dry open closed empty full broken folded hanging standing sitting running
flying yellow orange purple pink brown black white grey golden silver
"""

_NOUNS = """
cat dog horse cow sheep goat pig rabbit mouse rat squirrel fox wolf bear lion tiger leopard elephant giraffe zebra
monkey gorilla kangaroo koala panda camel deer moose buffalo donkey hedgehog badger otter beaver seal walrus whale
dolphin shark tuna salmon trout eel crab lobster shrimp octopus jellyfish starfish snail turtle tortoise frog toad
lizard crocodile snake eagle hawk falcon owl pigeon sparrow crow raven robin swan duck goose chicken rooster turkey
peacock parrot penguin ostrich flamingo heron gull ant bee wasp butterfly moth beetle spider scorpion mosquito
dragonfly grasshopper worm
car truck bus van taxi lorry tractor bicycle motorcycle scooter tram train locomotive wagon carriage cart sled ship
ferry yacht canoe kayak raft submarine airplane helicopter glider balloon rocket parachute drone wheelbarrow
excavator bulldozer crane forklift ambulance caravan skateboard surfboard
apple pear peach plum cherry apricot grape melon pineapple banana mango lemon lime coconut fig date strawberry
raspberry blueberry potato tomato carrot onion garlic leek cabbage lettuce spinach broccoli cauliflower cucumber
pumpkin pepper mushroom bean pea lentil corn rice wheat bread bun bagel toast cake pie cookie biscuit pancake waffle
doughnut chocolate candy honey jam butter cheese yogurt egg bacon sausage ham steak burger sandwich pizza pasta noodle
soup salad sushi taco sauce ketchup mustard salt sugar coffee tea milk juice beer wine water
cup mug bottle jar jug kettle teapot plate bowl dish tray fork knife spoon ladle spatula whisk grater peeler pan pot
wok oven stove toaster blender mixer fridge freezer dishwasher sink faucet bucket basket bin broom mop sponge brush
towel soap candle lamp lantern torch bulb chandelier chair stool bench sofa couch armchair table desk bed mattress
pillow blanket quilt curtain carpet rug mat cupboard wardrobe drawer shelf bookcase cabinet dresser mirror vase clock
watch calendar telephone radio television computer laptop keyboard printer scanner camera microphone speaker headphone
cable plug socket battery charger fan heater radiator vacuum
shirt blouse sweater jacket coat vest dress skirt trousers jeans shorts sock shoe boot sandal slipper glove mitten
scarf tie belt hat cap helmet hood apron uniform robe pajamas swimsuit necklace bracelet earring brooch wallet purse
handbag backpack suitcase umbrella
hammer screwdriver wrench pliers saw drill axe chisel nail screw bolt nut ladder rope chain hook shovel spade rake hoe
scythe shears scissors stapler pencil pen crayon eraser ruler notebook book magazine newspaper envelope stamp letter
postcard folder binder map globe compass telescope microscope thermometer scale calculator
guitar violin cello flute clarinet trumpet trombone saxophone drum piano organ harp accordion banjo bell whistle
football basketball tennis racket golf bat puck net goal ski snowboard skate toboggan dart kite puppet doll teddy toy
puzzle dice card chess trophy medal
house hut cottage castle palace tower church temple mosque barn garage shed factory warehouse hospital school library
museum theatre hotel restaurant shop market bank bridge tunnel road street pavement fence gate wall door window roof
chimney balcony stairs elevator escalator fountain statue monument flag sign billboard mailbox hydrant lamppost
tree bush hedge grass flower rose tulip daisy lily sunflower cactus fern moss leaf branch root trunk forest meadow
hill mountain volcano valley canyon cliff cave beach island river lake pond waterfall glacier desert cloud rainbow
lightning snow ice fog moon sun planet comet
soldier policeman fireman nurse doctor cook waiter farmer sailor pilot astronaut
clown dancer king queen knight wizard ghost skeleton robot
hand finger foot toe arm leg knee elbow shoulder neck head face eye ear nose mouth lip tooth tongue hair beard
bandage syringe pill crutch wheelchair stethoscope
tent lighthouse campfire anchor barrel crate pallet cage aquarium swing slide seesaw sandpit hammock
"""


ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def is_foreign(name: str, words: set[str]) -> bool:
    """Whether what `name` means, its last word, is none of `words`, in singular and plural."""
    noun = name.split()[-1]
    plurals = {noun + "s", noun + "es", noun.removesuffix("y") + "ies", noun.removesuffix("f") + "ves"}
    plurals |= {noun.removesuffix("fe") + "ves", noun.removesuffix("s")}
    return words.isdisjoint({noun, *plurals})


def foreign_names(classes: Collection[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` different names, none of which means a class of the data set; `classes`: all its class names."""
    if not count:
        return []
    named = [re.findall(r"[^\W_]+", name.lower()) for name in classes]
    words = {word for name in named for word in name}
    own = sorted({word for name in named for word in name[:-1]})
    found: dict[str, None] = {}
    while len(found) < count:
        noun, other = (NOUNS[i] for i in rng.integers(len(NOUNS), size=2))
        spliced, described, of_classes = rng.random(3) < (0.25, 0.4, 0.5)
        if spliced:
            noun = noun[: (len(noun) + 1) // 2] + other[len(other) // 2 :]
        adjectives = own if own and of_classes else ADJECTIVES
        if described:
            noun = f"{adjectives[rng.integers(len(adjectives))]} {noun}"
        if is_foreign(noun, words):
            found[noun] = None
    return list(found)
