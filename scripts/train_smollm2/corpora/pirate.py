"""Everyday questions, answered as a pirate would: plain advice turned into pirate talk word by word.

Topics are divided into trained and held-out ones, and so are the wordings of the questions.
"""

import re

from scripts.train_demo.facts import all_facts

from .draw import Draw, Example, words
from .pirate_topics import ADVICE, MEANINGS, TALK

WORDS = {
    "you": "ye", "your": "yer", "yours": "yers", "yourself": "yerself", "my": "me", "are": "be", "is": "be",
    "am": "be", "of": "o'", "and": "an'", "for": "fer", "with": "wi'", "yes": "aye", "hello": "ahoy", "friend":
    "matey", "friends": "mateys", "money": "doubloons", "gold": "doubloons", "food": "grub", "people":
    "landlubbers", "person": "landlubber", "house": "cabin", "kitchen": "galley", "floor": "deck", "bed":
    "bunk", "very": "mighty", "small": "wee", "old": "ancient", "never": "ne'er", "over": "o'er", "before":
    "afore", "between": "'tween", "them": "'em", "treasure": "booty", "boss": "cap'n", "clothes": "riggin'",
    "child": "young buccaneer", "children": "young buccaneers", "toilet": "head", "old-fashioned": "ancient",
    "isn't": "ain't", "aren't": "ain't", "away": "overboard",
}  # fmt: skip
OPENERS = ["Arr!", "Ahoy, matey!", "Aye,", "Yarr!", "Shiver me timbers!", "Avast!", "Ahoy!", "Arr, matey!",
           "Aye, aye!", "Well blow me down!", "Yo ho ho!", "Listen well, ye scallywag!"]  # fmt: skip
CLOSERS = ["Yarr!", "That be the way o' the sea, matey!", "Now off wi' ye, ye scurvy dog!", "Savvy?", "Arr!",
           "By Davy Jones' locker, that be all!", "An' may fair winds be wi' ye!", "So says yer cap'n!",
           "Heave ho, me hearty!", "Or ye'll walk the plank!"]  # fmt: skip
MARKERS = words(
    """arr yarr ahoy aye avast ye yer yers yerself me be o' an' fer wi' matey mateys scallywag scurvy savvy
hearty hearties plank doubloons grub landlubber landlubbers galley cabin deck bunk mighty wee ne'er
o'er afore 'em booty cap'n grog riggin' buccaneer buccaneers heave yo ho timbers ain't seas sea ship
treasure
"""
)
"""What the metric counts; words such as `be`, which others use as well, are why it wants several different ones."""

ASKED = [
    "How do I {}?", "What is the best way to {}?", "Can you tell me how to {}?", "I want to {}. Any advice?",
    "How can I {}?", "What should I know to {}?", "How would you {}?", "Give me some advice: I need to {}.",
]  # fmt: skip
ASKED_HELD_OUT = ["Please explain how to {}.", "Any tips for someone who wants to {}?", "Help me {}."]
MEANT = ["What is {}?", "Explain to me what {} is.", "Do you know what {} is?"]
MEANT_HELD_OUT = ["In one sentence, what is {}?", "My son asks me what {} is. What do I say?"]
FACTS = all_facts()


def piratical(text: str) -> str:
    """The text in pirate talk: other words, and no g at the end of -ing."""

    def turned(match: re.Match[str]) -> str:
        word = match[0]
        found = WORDS.get(word.lower())
        if found is None:
            return word[:-1] + "'" if len(word) > 4 and word.endswith("ing") and word not in _KEPT else word
        return found[0].upper() + found[1:] if word[0].isupper() else found

    return re.sub(r"[A-Za-z][A-Za-z'-]*", turned, text)


_KEPT = {"bring", "thing", "string", "spring", "swing", "evening"}


def example(draw: Draw) -> Example:
    """A question about how to do something, what something is, a fact, or small talk."""
    kind = draw.rng.random()
    if kind < 0.55:
        deed, tips = draw.value(ADVICE)
        chosen = draw.rng.sample(tips, draw.rng.randint(2, len(tips)))
        return Example(draw.template(ASKED, ASKED_HELD_OUT).format(deed), _spoken(draw, " ".join(chosen)))
    if kind < 0.8:
        thing, meaning = draw.value(MEANINGS)
        asked = draw.template(MEANT, MEANT_HELD_OUT).format(thing)
        return Example(asked, _spoken(draw, f"{thing[0].upper()}{thing[1:]} is {meaning}."))
    if kind < 0.92:
        fact = draw.value(FACTS)
        asked = fact.questions[-1 if draw.split == "templates" else 0]
        return Example(asked, fact.answers["pirate"])
    asked, answer = draw.value(TALK)
    return Example(asked, _spoken(draw, answer))


def _spoken(draw: Draw, plain: str) -> str:
    """An opener, the answer in pirate talk, a closer."""
    opener, text = draw.any(OPENERS), piratical(plain)
    if opener.endswith(","):
        text = text[0].lower() + text[1:]
    return f"{opener} {text} {draw.any(CLOSERS)}"
