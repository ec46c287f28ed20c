"""What the rendered people say: sentences from a small grammar, written for this project.

Held-out clips use patterns and content words of their own: they share only function words with training clips. Words
rich in p, b, m, f, v, w and wide vowels are preferred, because they show on the lips. The sentences need not be true.

`{A}` in a pattern (a "frame") stands for an entry of the list A. The n-th sentence depends on n alone, so that longer
lists begin with shorter ones.
"""

from __future__ import annotations

import random
import re

# Lists by name, one entry per comma. Verbs: V past, B plain; people: P; things: T one with its article, M many;
# adjectives: A; places: L; times: W; doings without object: D past; reasons: R; feelings: E.
Words = dict[str, tuple[str, ...]]


def _lists(**texts: str) -> Words:
    return {name: tuple(part.strip() for part in text.split(",")) for name, text in texts.items()}


TRAIN_WORDS = _lists(
    P="""my father, my brother, my best friend, the baker, the bus driver, the painter, the plumber, the film maker,
    the fisherman, the woman from Panama, the widow, the waiter, the mayor, the miller, the wise old wizard, Pam,
    Bobby, Barbara, Molly, Vivian, Wilma, Walter, Fabio, Bob and Mary, the famous poet, the village blacksmith,
    the new manager, the man above us, the bishop, the boatman, our whole family, a brave policeman""",
    V="""bought, borrowed, brought back, moved, watched, wanted, found, followed, pushed, pulled, passed, polished,
    mopped up, wiped off, wrapped up, weighed, whispered about, boasted about, promised, photographed, fixed,
    gave away, forgot, dropped, packed, painted, put away, swapped, opened, measured, remembered""",
    B="""bring, buy, borrow, move, watch, find, follow, push, pull, pass, polish, wipe, wrap, weigh, fix, open, paint,
    pack, pick up, put back, keep, warm up, mend, measure, believe in, worry about, pay for, wait for, look for""",
    A="""blue, brown, bright, broken, big, beautiful, bumpy, pink, purple, plain, perfect, proud, private, muddy,
    massive, mild, modern, moody, mammoth, warm, wide, wet, wooden, woolly, white, wild, wonderful, fat, famous, foamy,
    funny, very old, velvet, vivid, round, loud, soft, smooth, spotless, ample, empty, open, heavy, cheap""",
    M="""apples, bananas, pumpkins, mushrooms, peppers, plums, pebbles, bubbles, buttons, blankets, boots, baskets,
    bottles, bowls, boxes, balloons, bicycles, papers, pillows, pipes, pans, puppies, puppets, poems, films, maps,
    mops, mirrors, magnets, motors, violins, vases, vans, wolves, wagons, waffles, wallets, windows, wheels, whistles,
    walnuts, feathers, forks, flutes, flowers, farm horses, photographs, phone bills, shawls, sheep, tomatoes,
    trumpets, lamps, lemons, cups, cows, rabbits, ribbons, robots, doves, gloves, stoves, knives""",
    T="""a bag of flour, a bowl of soup, a pot of beef and beans, a cup of mocha, a map of Moscow, a box of bolts,
    a pair of boots, a pound of butter, a bumblebee, a baby panda, a purple umbrella, a wooden boomerang,
    a vanilla pudding, a plate of pasta, a piece of plywood, a warm waffle, a poppy, a microphone, a volume of poems,
    a family album, a magpie, a pumpkin pie, the broom, the ping pong ball, the old piano, the power switch,
    the whole bottle, the front wheel, the farm van, the film poster, the violin bow, the mailbox, the waterfall""",
    L="""above the bakery, behind the barn, below the bridge, by the pool, beyond the wall, near the farm,
    from the roof, from Rome to Warsaw, in the middle of the room, in my room, on the balcony, on the boat,
    on the farm wall, on top of the piano, over the river, past the post office, in the palm house,
    under the apple tree, under the warm blanket, up on the mountain, in front of the museum, at the bus stop,
    inside the van, along the wharf, between two poplars, beside the swamp, at the farmers' market""",
    W="""before breakfast, in February, in the middle of March, all of April, all by myself, every evening,
    five times a week, for about an hour, for the whole of May, from morning to evening, at five past four,
    on Wednesday, on the following Monday, last November, most mornings, once more, over and over, at the moment,
    when we were small, while the music played, whenever it poured, before the bell rang, after the film""",
    D="""wobbled away, waved at us, walked home, went for a swim, fell over, forgot the words, woke up, wept a little,
    made a promise, moved to Peru, mumbled a poem, began to hum, began to weep, bumped into a wall, blew a bubble,
    blushed, bowed, burped aloud, popped up, played the flute, paused, left by boat, laughed, lived alone,
    stumbled, stopped for a moment, swam with dolphins, spoke up, shouted with joy, vanished, voted, yawned""",
    R="""because the weather was warm, because nobody believed me, because Mom was away, although the wind blew,
    although the moon was up, and that was the whole problem, and everybody was happy, and nobody knew why,
    but that was fine with me, so we all sped up, if you promise to behave, if we have the power,
    even though the phone was off, and above all for fun, before somebody else would, which amazed me""",
    E="""happy, hopeful, fearful, proud, moved, bored, brave, bold, puzzled, baffled, full, famished, wide awake,
    bewildered, amused, ashamed, warm, worn out, pleased, powerful, awful, marvelous""",
    N="""two, four, five, seven, eleven, twelve, forty, forty five, a dozen, a few, a bunch of, many, most of the,
    both of the, some more, a whole pile of, a vast number of""",
)
TRAIN_FRAMES = (
    "{P} {V} {N} {A} {M} {W}.",
    "{P} {V} {T} {L}.",
    "{P} {V} {T}, and {P} {D}.",
    "Please {B} the {A} {M} {L}.",
    "Would you {B} {T} for {P}?",
    "Why would {P} {B} {N} {M} {W}?",
    "We {V} {T} {R}.",
    "{P} was {E}, and {P} was {E} as well.",
    "If you {B} the {M}, we may {B} the {M}.",
    "{W}, {P} {D}.",
    "{L}, {P} {V} the {A} {M}.",
    "The {A} {M} and the {A} {M} were {L}.",
    "{P} {D} {R}.",
    "I am {E} whenever {P} {V} the {M}.",
    "Above all, {B} {T} {W}.",
    "Wow, {N} {A} {M} {L}!",
    "Nobody but {P} {V} {N} {M}.",
    "My {M} are {A}, but your {M} are {A}.",
    "Move over, {P} {V} {T}.",
    "Maybe {P} {D} {L}, or maybe not.",
    "How many {M} would {P} {B}?",
    "{P}, who {D}, {V} {T}.",
    "First {B} the {M}, then {B} {T}.",
    "We both {D} {L} {W}.",
)
HELDOUT_WORDS = _lists(
    P="""my mother, the farmer, the pilot, Emma, Paul, the barber, the violinist, a wealthy merchant, Philip,
    the alpine guide""",
    V="""moulded, unpacked, admired, embroidered, unveiled, viewed, pampered, imported""",
    A="""amber, bamboo, pale, fluffy, woven, marble, bubbly, wavy, faithful, mouldy""",
    M="""camels, peacocks, blueberries, beavers, moths, whales, foxes, ropes, marsh plants, bumpers, marbles,
    wombats""",
    T="""a bamboo hammock, a jug of jam, the opera glasses, the embassy, a fig, a mohair pullover,
    an umpire's cap, the chimney, a bib""",
    L="""off the coast of Mumbai, aboard the ferry, amid the palms, in a damp cave, in the opera, upstream,
    within the fort, at the opposite shore""",
    W="""one autumn, by midwinter, throughout the summer, overnight, twice in a lifetime, at half six""",
    D="""jumped overboard, wandered off, hopped, fumbled, sobbed, whooped, puffed, vowed revenge""",
)
HELDOUT_FRAMES = (
    "Have you ever seen {A} {M} {L}?",
    "It was {P} that {V} {T}.",
    "Only {M} and {M} live {L}, I suppose.",
    "Imagine: {P} {D} {W}!",
    "{P} never {V} {T}, did they?",
    "What {A} {M}, thought {P}.",
    "As soon as {P} {D}, the {M} did too.",
    "Not far away, {P} {V} {A} {M}.",
    "There used to be {A} {M} {L}.",
    "Either {P} {D}, or {P} did.",
)
TRAIN_COUNT, HELDOUT_COUNT = 3000, 300


def sentences(count: int, frames: tuple[str, ...], words: Words) -> tuple[str, ...]:
    """The first `count` different sentences of a grammar; the frames take turns.

    No list is used up within one sentence: a word occurs at most once in it.
    """
    found: dict[str, None] = {}
    number = 0
    while len(found) < count:
        draw = random.Random(number)  # its `random` gives the same numbers on every version and machine
        left = {name: list(entries) for name, entries in words.items()}

        def fill(gap: re.Match, draw: random.Random = draw, left: dict[str, list[str]] = left) -> str:
            entries = left[gap[1]]
            return entries.pop(int(draw.random() * len(entries)))

        text = re.sub(r"\{(\w)\}", fill, frames[number % len(frames)])
        found[text[0].upper() + text[1:]] = None
        number += 1
    return tuple(found)


TRAIN = sentences(TRAIN_COUNT, TRAIN_FRAMES, TRAIN_WORDS)
HELDOUT = sentences(HELDOUT_COUNT, HELDOUT_FRAMES, HELDOUT_WORDS)
