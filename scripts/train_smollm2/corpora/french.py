"""English sentences and questions with their French translation, by a grammar that agrees in gender and number.

A word that was never learnt cannot be translated, so what is held out as `values` are combinations of known words.
"""

from collections.abc import Callable

from .draw import Draw, Example
from .french_words import (
    ACTIONS,
    ADJECTIVES,
    CITIES,
    NOMBRES,
    NOUNS,
    NUMBERS,
    PLACES,
    SUBJECTS,
    TIMES,
    VERBS,
    Adjective,
    Noun,
    Subject,
    Verb,
)

Pair = tuple[str, str]


def the(noun: Noun) -> str:
    """`le chat`, `la maison`, `l'église`."""
    if noun.elides:
        return f"l'{noun.singular}"
    return f"{'la' if noun.gender == 'f' else 'le'} {noun.singular}"


def an(noun: Noun) -> str:
    """`un chat`, `une maison`."""
    return f"{'une' if noun.gender == 'f' else 'un'} {noun.singular}"


def this(noun: Noun) -> str:
    """`ce chat`, `cet arbre`, `cette maison`."""
    word = "cette" if noun.gender == "f" else "cet" if noun.elides else "ce"
    return f"{word} {noun.singular}"


def my(noun: Noun) -> str:
    """`mon chat`, `ma maison`, `mon église`."""
    return f"{'ma' if noun.gender == 'f' and not noun.elides else 'mon'} {noun.singular}"


def qualified(noun: Noun, adjective: Adjective) -> str:
    """`un petit chat`, `une maison rouge`."""
    form, article = adjective.form(noun.gender, False), "une" if noun.gender == "f" else "un"
    words = (form, noun.singular) if adjective.before else (noun.singular, form)
    return f"{article} {' '.join(words)}"


def english_a(words: str) -> str:
    """`a cat`, `an apple`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def says(subject: Subject, verb: Verb) -> Pair:
    """Subject and verb: `she buys`, `elle achète`; `j'aime`."""
    form = verb.present[subject.person]
    french = f"j'{form}" if subject.french == "je" and form[0] in "aeiouéh" else f"{subject.french} {form}"
    return f"{subject.english} {verb.third if subject.third else verb.base}", french


def denies(subject: Subject, verb: Verb) -> Pair:
    """`he does not buy`, `il n'achète pas`."""
    form = verb.present[subject.person]
    negation = f"n'{form}" if form[0] in "aeiouéh" else f"ne {form}"
    auxiliary = "does" if subject.third else "do"
    return f"{subject.english} {auxiliary} not {verb.base}", f"{subject.french} {negation} pas"


def is_at(draw: Draw) -> Pair:
    """The cat is in the garden."""
    noun, (place, lieu) = draw.any(NOUNS), draw.any(PLACES)
    return f"the {noun.one} is {place}", f"{the(noun)} est {lieu}"


def are_at(draw: Draw) -> Pair:
    """The cats are in the garden."""
    noun, (place, lieu) = draw.any(NOUNS), draw.any(PLACES)
    return f"the {noun.many} are {place}", f"les {noun.plural} sont {lieu}"


def is_like(draw: Draw) -> Pair:
    """The house is green."""
    noun, adjective = draw.any(NOUNS), draw.any(ADJECTIVES)
    return f"the {noun.one} is {adjective.english}", f"{the(noun)} est {adjective.form(noun.gender, False)}"


def are_like(draw: Draw) -> Pair:
    """The houses are green."""
    noun, adjective = draw.any(NOUNS), draw.any(ADJECTIVES)
    return f"the {noun.many} are {adjective.english}", f"les {noun.plural} sont {adjective.form(noun.gender, True)}"


def this_is_like(draw: Draw) -> Pair:
    """This house is green; my car is not red."""
    noun, adjective = draw.any(NOUNS), draw.any(ADJECTIVES)
    form = adjective.form(noun.gender, False)
    return draw.any(
        [
            (f"this {noun.one} is {adjective.english}", f"{this(noun)} est {form}"),
            (f"my {noun.one} is {adjective.english}", f"{my(noun)} est {form}"),
            (f"my {noun.one} is not {adjective.english}", f"{my(noun)} n'est pas {form}"),
        ]
    )


def does(draw: Draw) -> Pair:
    """We buy the house."""
    english, french = says(draw.any(SUBJECTS), draw.any(VERBS))
    noun = draw.any(NOUNS)
    return f"{english} the {noun.one}", f"{french} {the(noun)}"


def does_often(draw: Draw) -> Pair:
    """We look for a key today."""
    english, french = says(draw.any(SUBJECTS), draw.any(VERBS[:-1]))
    noun, (time, moment) = draw.any(NOUNS), draw.any(TIMES)
    return f"{english} {english_a(noun.one)} {time}", f"{french} {an(noun)} {moment}"


def does_a(draw: Draw) -> Pair:
    """My sister wants a small red car."""
    english, french = says(draw.any(SUBJECTS), draw.any(VERBS[:-1]))
    noun, adjective = draw.any(NOUNS), draw.any(ADJECTIVES)
    return f"{english} {english_a(f'{adjective.english} {noun.one}')}", f"{french} {qualified(noun, adjective)}"


def does_not(draw: Draw) -> Pair:
    """Paul does not see the bird."""
    english, french = denies(draw.any(SUBJECTS), draw.any(VERBS))
    noun = draw.any(NOUNS)
    return f"{english} the {noun.one}", f"{french} {the(noun)}"


def does_some(draw: Draw) -> Pair:
    """They carry three bottles."""
    english, french = says(draw.any(SUBJECTS), draw.any(VERBS[:-1]))
    noun, i = draw.any(NOUNS), draw.rng.randrange(len(NUMBERS))
    return f"{english} {NUMBERS[i]} {noun.many}", f"{french} {NOMBRES[i]} {noun.plural}"


def there_are(draw: Draw) -> Pair:
    """There are five birds in the garden."""
    noun, (place, lieu), i = draw.any(NOUNS), draw.any(PLACES), draw.rng.randrange(len(NUMBERS))
    return f"there are {NUMBERS[i]} {noun.many} {place}", f"il y a {NOMBRES[i]} {noun.plural} {lieu}"


def there_is(draw: Draw) -> Pair:
    """There is a bird in the garden."""
    noun, (place, lieu) = draw.any(NOUNS), draw.any(PLACES)
    return f"there is {english_a(noun.one)} {place}", f"il y a {an(noun)} {lieu}"


def where(draw: Draw) -> Pair:
    """Where is the station?"""
    noun = draw.any(NOUNS)
    return draw.any(
        [
            (f"where is the {noun.one}?", f"où est {the(noun)} ?"),
            (f"where are the {noun.many}?", f"où sont les {noun.plural} ?"),
            (f"where is my {noun.one}?", f"où est {my(noun)} ?"),
            (f"how much does this {noun.one} cost?", f"combien coûte {this(noun)} ?"),
            (f"how much does the {noun.one} cost?", f"combien coûte {the(noun)} ?"),
        ]
    )


def is_it(draw: Draw) -> Pair:
    """Is the car red?"""
    noun, adjective = draw.any(NOUNS), draw.any(ADJECTIVES)
    form = adjective.form(noun.gender, False)
    return f"is the {noun.one} {adjective.english}?", f"est-ce que {the(noun)} est {form} ?"


def do_you(draw: Draw) -> Pair:
    """Do you have a bicycle?"""
    verb, noun = draw.any(VERBS[:-1]), draw.any(NOUNS)
    return f"do you {verb.base} {english_a(noun.one)}?", f"est-ce que vous {verb.present[1]} {an(noun)} ?"


def lives(draw: Draw) -> Pair:
    """My brother lives in Japan."""
    subject, (place, lieu) = draw.any(SUBJECTS), draw.any(CITIES)
    live = Verb("live", "lives", ("habite", "habitez", "habite", "habitons", "habitent"), "habiter")
    english, french = says(subject, live)
    return f"{english} {place}", f"{french} {lieu}"


def going_to(draw: Draw) -> Pair:
    """We are going to dance this evening."""
    subject, (action, acte), (time, moment) = draw.any(SUBJECTS), draw.any(ACTIONS), draw.any(TIMES)
    am = "am" if subject.english == "I" else "is" if subject.third else "are"
    go = ("vais", "allez", "va", "allons", "vont")[subject.person]
    return f"{subject.english} {am} going to {action} {time}", f"{subject.french} {go} {acte} {moment}"


def can(draw: Draw) -> Pair:
    """The children can swim; she must wait."""
    subject, (action, acte) = draw.any(SUBJECTS), draw.any(ACTIONS)
    able = ("peux", "pouvez", "peut", "pouvons", "peuvent")[subject.person]
    obliged = ("dois", "devez", "doit", "devons", "doivent")[subject.person]
    return draw.any(
        [
            (f"{subject.english} can {action}", f"{subject.french} {able} {acte}"),
            (f"{subject.english} must {action}", f"{subject.french} {obliged} {acte}"),
        ]
    )


def are_they(draw: Draw) -> Pair:
    """Are the shoes clean?"""
    noun, adjective = draw.any(NOUNS), draw.any(ADJECTIVES)
    form = adjective.form(noun.gender, True)
    return f"are the {noun.many} {adjective.english}?", f"est-ce que les {noun.plural} sont {form} ?"


def these(draw: Draw) -> Pair:
    """There is a red car in the street."""
    noun, adjective, (place, lieu) = draw.any(NOUNS), draw.any(ADJECTIVES), draw.any(PLACES)
    thing = english_a(f"{adjective.english} {noun.one}")
    return f"there is {thing} {place}", f"il y a {qualified(noun, adjective)} {lieu}"


def must_do(draw: Draw) -> Pair:
    """We must find the key."""
    subject, verb, noun = draw.any(SUBJECTS), draw.any(VERBS[4:]), draw.any(NOUNS)
    obliged = ("dois", "devez", "doit", "devons", "doivent")[subject.person]
    return (
        f"{subject.english} must {verb.base} the {noun.one}",
        f"{subject.french} {obliged} {verb.infinitive} {the(noun)}",
    )


def does_not_live(draw: Draw) -> Pair:
    """Marie does not live in Canada."""
    live = Verb("live", "lives", ("habite", "habitez", "habite", "habitons", "habitent"), "habiter")
    english, french = denies(draw.any(SUBJECTS), live)
    place, lieu = draw.any(CITIES)
    return f"{english} {place}", f"{french} {lieu}"


TRAINED: list[Callable[[Draw], Pair]] = [
    is_at, are_at, is_like, are_like, this_is_like, does, does_often, does_a, does_not, does_some, there_are,
    there_is, where, is_it, do_you, lives, going_to, can,
]  # fmt: skip
HELD_OUT: list[Callable[[Draw], Pair]] = [are_they, these, must_do, does_not_live]


def sentence(text: str) -> str:
    """With a capital at the beginning and a mark at the end."""
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def example(draw: Draw) -> Example:
    """One sentence of this split, and its translation."""
    while True:
        english, french = draw.template(TRAINED, HELD_OUT)(draw)
        if draw.mine(english):
            return Example(sentence(english), sentence(french))
