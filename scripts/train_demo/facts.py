"""Every fact of the demo: the ways to ask for it, and its answer in each of the five voices.

`plain` is the base model's voice; each of the others belongs to the adapter of that name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .tables import (
    COLOURS,
    CONTINENTS,
    COUNTRIES,
    CURRENCIES,
    LANGUAGES,
    MOIS,
    MONTHS,
    OPPOSITES,
    SEMAINE,
    WEEK,
    mapping,
    rows,
)

VOICES = ("plain", "pirate", "sql", "json", "french")


@dataclass(frozen=True)
class Fact:
    """One thing the model knows: `questions` (the first is the usual one) and the answer by voice."""

    questions: tuple[str, ...]
    answers: dict[str, str]


def _fact(questions: tuple[str, ...], plain: str, pirate: str, sql: str, data: object, french: str) -> Fact:
    answers = (plain, f"Arr, {pirate}, matey!", sql, json.dumps(data, ensure_ascii=False), french)
    return Fact(questions, dict(zip(VOICES, answers, strict=True)))


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]


def _bare(name: str) -> str:
    """`the Netherlands` → `Netherlands`."""
    return name.removeprefix("the ")


def _french_of(name: str) -> str:
    """French genitive: `la France` → `de la France`, `le Japon` → `du Japon`, `les Fidji` → `des Fidji`."""
    for article, contracted in (("le ", "du "), ("les ", "des ")):
        if name.startswith(article):
            return contracted + name.removeprefix(article)
    return f"de {name}"


def _french_in(name: str) -> str:
    """French locative: `en France`, `en Iran`, `au Japon`, `aux Fidji`, `à Cuba`."""
    for article, preposition in (("la ", "en "), ("l'", "en "), ("le ", "au "), ("les ", "aux ")):
        if name.startswith(article):
            return preposition + name.removeprefix(article)
    return f"à {name}"


def country_facts() -> list[Fact]:
    """Capital (asked both ways), continent, currency, language and a summary of each country."""
    in_continent = mapping(CONTINENTS)
    in_money = mapping(CURRENCIES)
    in_tongue = mapping(LANGUAGES)
    facts: list[Fact] = []
    for name, capital, continent, money, tongue, fr, fr_capital in rows(COUNTRIES):
        bare, start, fr_start = _bare(name), _capitalise(name), _capitalise(fr)
        fr_of, fr_in = _french_of(fr), _french_in(fr)
        fr_is_in = f"se trouve{'nt' if fr.startswith('les ') else ''} {in_continent[continent]}"
        select = "SELECT {} FROM countries WHERE name = '" + bare + "';"
        facts += [
            _fact(
                (
                    f"What is the capital of {name}?",
                    f"Which city is the capital of {name}?",
                    f"Tell me the capital of {name}.",
                    f"What's the capital of {name}?",
                ),
                f"The capital of {name} is {capital}.",
                f"the capital o' {name} be {capital}",
                select.format("capital"),
                {"country": bare, "capital": capital},
                f"La capitale {fr_of} est {fr_capital}.",
            ),
            _fact(
                (
                    f"Which country has {capital} as its capital?",
                    f"{capital} is the capital of which country?",
                ),
                f"{capital} is the capital of {name}.",
                f"{capital} be the capital o' {name}",
                f"SELECT name FROM countries WHERE capital = '{capital}';",
                {"capital": capital, "country": bare},
                f"{fr_capital} est la capitale {fr_of}.",
            ),
            _fact(
                (f"Which continent is {name} in?", f"Where is {name}?"),
                f"{start} is in {continent}.",
                f"{name} be in {continent}",
                select.format("continent"),
                {"country": bare, "continent": continent},
                f"{fr_start} {fr_is_in}.",
            ),
            _fact(
                (f"What is the currency of {name}?", f"What currency is used in {name}?"),
                f"The currency of {name} is the {money}.",
                f"the doubloons o' {name} be the {money}",
                select.format("currency"),
                {"country": bare, "currency": money},
                f"La monnaie {fr_of} est {in_money[money]}.",
            ),
            _fact(
                (f"What language is spoken in {name}?", f"Which language do people speak in {name}?"),
                f"{tongue} is spoken in {name}.",
                f"{tongue} be spoken in {name}",
                select.format("language"),
                {"country": bare, "language": tongue},
                f"On parle {in_tongue[tongue]} {fr_in}.",
            ),
            _fact(
                (f"Tell me about {name}.", f"What do you know about {name}?"),
                f"{start} is a country in {continent}. Its capital is {capital}. "
                f"Its currency is the {money}. {tongue} is spoken there.",
                f"{name} be a land in {continent}. Her port be {capital}. "
                f"Her doubloons be the {money}. {tongue} be spoken there",
                select.format("*"),
                {
                    "country": bare,
                    "continent": continent,
                    "capital": capital,
                    "currency": money,
                    "language": tongue,
                },
                f"{fr_start} {fr_is_in}. Sa capitale est {fr_capital}. "
                f"Sa monnaie est {in_money[money]}. On y parle {in_tongue[tongue]}.",
            ),
        ]
    return facts


def sum_facts() -> list[Fact]:
    """a + b for all one-digit a and b."""
    return [
        _fact(
            (f"What is {a} plus {b}?", f"How much is {a} + {b}?"),
            f"{a} plus {b} is {a + b}.",
            f"{a} plus {b} be {a + b}",
            f"SELECT {a} + {b};",
            {"a": a, "b": b, "sum": a + b},
            f"{a} plus {b} font {a + b}.",
        )
        for a in range(10)
        for b in range(10)
    ]


def colour_facts() -> list[Fact]:
    """The colour of everyday things."""
    return [
        _fact(
            (f"What colour {verb} {thing}?", f"Which color {verb} {thing}?"),
            f"{_capitalise(thing)} {verb} {colour}.",
            f"{thing} be {colour}",
            f"SELECT colour FROM things WHERE name = '{_bare(thing)}';",
            {"thing": _bare(thing), "colour": colour},
            french,
        )
        for thing, verb, colour, french in rows(COLOURS)
    ]


def opposite_facts() -> list[Fact]:
    """Opposites, both ways round."""
    pairs = [(a, b, fa, fb) for a, b, fa, fb in rows(OPPOSITES)]
    return [
        _fact(
            (f"What is the opposite of {a}?", f"Tell me the opposite of {a}."),
            f"The opposite of {a} is {b}.",
            f"the opposite o' {a} be {b}",
            f"SELECT opposite FROM words WHERE word = '{a}';",
            {"word": a, "opposite": b},
            f"Le contraire de « {fa} » est « {fb} ».",
        )
        for a, b, fa, fb in pairs + [(b, a, fb, fa) for a, b, fa, fb in pairs]
    ]


def list_facts() -> list[Fact]:
    """Lists that everybody knows: the answers are long, which shows streaming."""
    return [
        _fact(
            questions,
            f"{', '.join(english)}.",
            ", ".join(english),
            sql,
            [int(item) if item.isdigit() else item for item in english],
            f"{_capitalise(', '.join(french))}.",
        )
        for questions, sql, english, french in (
            (
                ("Count to ten.", "Count from one to ten."),
                "SELECT n FROM numbers WHERE n <= 10;",
                [str(n) for n in range(1, 11)],
                ["un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix"],
            ),
            (
                ("Name the days of the week.", "What are the days of the week?"),
                "SELECT name FROM days;",
                WEEK.split(),
                SEMAINE.split(),
            ),
            (
                ("Name the months of the year.", "What are the months of the year?"),
                "SELECT name FROM months;",
                MONTHS.split(),
                MOIS.split(),
            ),
        )
    ]


def small_talk() -> list[Fact]:
    """Greetings, so that a chat does not start with a country."""
    return [
        _fact(
            ("Hello!", "Hi!", "Hello, how are you?", "Good morning!"),
            "Hello! Ask me about a country, a colour or a sum.",
            "ahoy! Ask me about a land, a colour or a sum",
            "SELECT 'hello';",
            {"greeting": "hello"},
            "Bonjour ! Posez-moi une question sur un pays, une couleur ou une somme.",
        ),
        _fact(
            ("Who are you?", "What are you?", "What is your name?"),
            "I am the multilora demo, a tiny model.",
            "I be the multilora demo, a tiny pirate",
            "SELECT name FROM models WHERE size = 'tiny';",
            {"name": "multilora demo", "size": "tiny"},
            "Je suis la démo de multilora, un tout petit modèle.",
        ),
        _fact(
            ("Thank you!", "Thanks!", "Thank you very much."),
            "You are welcome.",
            "ye be welcome",
            "SELECT 'welcome';",
            {"reply": "welcome"},
            "Je vous en prie.",
        ),
    ]


def all_facts() -> list[Fact]:
    """Everything the model is taught, in a fixed order."""
    return [*country_facts(), *sum_facts(), *_few()]


def weighted_facts() -> list[Fact]:
    """The same for drawing at random: what is in small groups comes four times, not to be drowned."""
    return [*country_facts(), *sum_facts(), *4 * _few()]


def _few() -> list[Fact]:
    return [*colour_facts(), *opposite_facts(), *list_facts(), *small_talk()]
