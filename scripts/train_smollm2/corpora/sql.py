"""SQL from a schema: `CREATE TABLE` and a question become one query for SQLite.

The tables, and with them words and columns, are divided into trained and held-out ones, and so are the templates.
`check["setup"]` is a script that fills the tables, so that a query can be run.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .draw import Draw, Example
from .sql_tables import TABLES, Category, Number, Table

ROWS = 24
MOST_STEPS = 1000  # thousands of instructions of SQLite's machine, that one query may take


@dataclass(frozen=True)
class View:
    """A table as one example sees it: some of its columns, and a value of each sort to ask about."""

    table: Table
    categories: tuple[Category, ...]
    numbers: tuple[Number, ...]
    word: str  # a value of the first category
    amount: int  # of the first number
    few: int

    @property
    def schema(self) -> str:
        columns = [f"{self.table.label} TEXT"]
        columns += [f"{column.name} TEXT" for column in self.categories]
        columns += [f"{column.name} INTEGER" for column in self.numbers]
        return f"CREATE TABLE {self.table.name} ({', '.join(columns)})"


Question = tuple[str, str]
Template = Callable[[View], Question]


def q(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _simple(ask: str, answer: str) -> Template:
    """A template written with the names of what a view has."""

    def fill(view: View) -> Question:
        t, (c, *_), (n, *_) = view.table, view.categories, view.numbers
        names = {
            "t": t.name, "label": t.label, "one": t.one, "many": t.many, "c": c.name, "cs": c.plural, "n": n.name,
            "nn": n.phrase, "a_nn": f"{'an' if n.phrase[0] in 'aeiou' else 'a'} {n.phrase}", "word": view.word,
            "lit": q(view.word), "amount": str(view.amount), "more": str(view.amount + n.span // 4),
            "few": str(view.few), "c_": c.name.replace("_", " "), "label_": t.label.replace("_", " "),
        }  # fmt: skip
        return ask.format(**names), answer.format(**names)

    return fill


TRAINED = [
    _simple(ask, answer)
    for asks, answer in [
        (
            ("How many {many} are there?", "Count the {many}.", "What is the number of {many}?"),
            "SELECT COUNT(*) FROM {t};",
        ),
        (
            (
                "How many {many} have the {c_} {word}?",
                "Count the {many} whose {c_} is {word}.",
                "How many {many} are there with {c_} {word}?",
            ),
            "SELECT COUNT(*) FROM {t} WHERE {c} = {lit};",
        ),
        (
            ("How many {many} have {a_nn} above {amount}?", "Count the {many} with {a_nn} of more than {amount}."),
            "SELECT COUNT(*) FROM {t} WHERE {n} > {amount};",
        ),
        (
            (
                "List the {label_} of all {many} with {a_nn} greater than {amount}.",
                "Which {many} have {a_nn} above {amount}?",
                "Show {many} whose {nn} is more than {amount}.",
            ),
            "SELECT {label} FROM {t} WHERE {n} > {amount};",
        ),
        (
            (
                "List the {label_} of all {many} with {a_nn} less than {amount}.",
                "Which {many} have {a_nn} below {amount}?",
                "Show {many} whose {nn} is under {amount}.",
            ),
            "SELECT {label} FROM {t} WHERE {n} < {amount};",
        ),
        (
            (
                "Which {many} have the {c_} {word}?",
                "List the {label_} of every {one} whose {c_} is {word}.",
                "Show all {many} with {c_} {word}.",
            ),
            "SELECT {label} FROM {t} WHERE {c} = {lit};",
        ),
        (
            (
                "What is the average {nn} of the {many}?",
                "Give the mean {nn} of all {many}.",
                "What {nn} do the {many} have on average?",
            ),
            "SELECT AVG({n}) FROM {t};",
        ),
        (
            ("What is the highest {nn} of any {one}?", "Give the maximum {nn} of the {many}."),
            "SELECT MAX({n}) FROM {t};",
        ),
        (
            ("What is the lowest {nn} of any {one}?", "Give the minimum {nn} of the {many}."),
            "SELECT MIN({n}) FROM {t};",
        ),
        (
            ("What is the total {nn} of all {many}?", "Add up the {nn} of the {many}."),
            "SELECT SUM({n}) FROM {t};",
        ),
        (
            (
                "Which {one} has the highest {nn}?",
                "Name the {one} with the largest {nn}.",
                "What is the {label_} of the {one} that is first by {nn}?",
            ),
            "SELECT {label} FROM {t} ORDER BY {n} DESC LIMIT 1;",
        ),
        (
            ("Which {one} has the lowest {nn}?", "Name the {one} with the smallest {nn}."),
            "SELECT {label} FROM {t} ORDER BY {n} LIMIT 1;",
        ),
        (
            ("Show the {few} {many} with the highest {nn}.", "What are the top {few} {many} by {nn}?"),
            "SELECT {label} FROM {t} ORDER BY {n} DESC LIMIT {few};",
        ),
        (
            ("Show the {few} {many} with the lowest {nn}.",),
            "SELECT {label} FROM {t} ORDER BY {n} LIMIT {few};",
        ),
        (
            ("List all {many} sorted by {nn}.", "Show the {many} ordered by {nn}, lowest first."),
            "SELECT {label} FROM {t} ORDER BY {n};",
        ),
        (
            ("What are the different {cs} of the {many}?", "List the distinct {cs} in {t}."),
            "SELECT DISTINCT {c} FROM {t};",
        ),
        (
            ("How many {many} are there for each {c_}?", "Count the {many} by {c_}."),
            "SELECT {c}, COUNT(*) FROM {t} GROUP BY {c};",
        ),
        (
            ("What is the average {nn} for each {c_}?", "Give the mean {nn} of the {many} by {c_}."),
            "SELECT {c}, AVG({n}) FROM {t} GROUP BY {c};",
        ),
        (
            ("What is the total {nn} for each {c_}?", "Add up the {nn} of the {many} by {c_}."),
            "SELECT {c}, SUM({n}) FROM {t} GROUP BY {c};",
        ),
        (
            (
                "Which {many} with {c_} {word} have {a_nn} above {amount}?",
                "List the {label_} of {many} whose {c_} is {word} and whose {nn} is more than {amount}.",
            ),
            "SELECT {label} FROM {t} WHERE {c} = {lit} AND {n} > {amount};",
        ),
        (
            ("Which {many} have {a_nn} between {amount} and {more}?",),
            "SELECT {label} FROM {t} WHERE {n} BETWEEN {amount} AND {more};",
        ),
        (
            ("Which {cs} have more than {few} {many}?",),
            "SELECT {c} FROM {t} GROUP BY {c} HAVING COUNT(*) > {few};",
        ),
        (
            ("Show the {label_} and the {nn} of all {many}.", "List each {one} with its {nn}."),
            "SELECT {label}, {n} FROM {t};",
        ),
        (
            ("What is the average {nn} of {many} with {c_} {word}?",),
            "SELECT AVG({n}) FROM {t} WHERE {c} = {lit};",
        ),
        (
            ("Which {many} do not have the {c_} {word}?",),
            "SELECT {label} FROM {t} WHERE {c} <> {lit};",
        ),
    ]
    for ask in asks
]
HELD_OUT = [
    _simple(ask, answer)
    for ask, answer in [
        ("What is the highest {nn} for each {c_}?", "SELECT {c}, MAX({n}) FROM {t} GROUP BY {c};"),
        ("Of all {many} with {c_} {word}, what is the total {nn}?", "SELECT SUM({n}) FROM {t} WHERE {c} = {lit};"),
        ("Which {one} with {c_} {word} has the highest {nn}?",
         "SELECT {label} FROM {t} WHERE {c} = {lit} ORDER BY {n} DESC LIMIT 1;"),
        ("How many {many} with {c_} {word} have {a_nn} below {amount}?",
         "SELECT COUNT(*) FROM {t} WHERE {c} = {lit} AND {n} < {amount};"),
        ("I need the names of the {many} that have more than {amount} as {nn}.",
         "SELECT {label} FROM {t} WHERE {n} > {amount};"),
        ("Tell me how many {many} we have.", "SELECT COUNT(*) FROM {t};"),
        ("Sort the {many} by {nn}, highest first.", "SELECT {label} FROM {t} ORDER BY {n} DESC;"),
    ]
]  # fmt: skip


def example(draw: Draw) -> Example:
    """One schema, one question, one query. What is held out has an answer: two queries without rows look the same."""
    while True:
        view = _view(draw)
        question, query = draw.template(TRAINED, HELD_OUT)(view)
        setup = _filled(view, draw)
        if draw.split == "train" or rows(setup, query):
            return Example(f"{view.schema};\n\n{question}", query, {"setup": setup})


def _view(draw: Draw) -> View:
    table = draw.value(TABLES)
    categories = draw.rng.sample(table.categories, draw.rng.randint(1, len(table.categories)))
    numbers = draw.rng.sample(table.numbers, draw.rng.randint(1, len(table.numbers)))
    number = numbers[0]
    return View(
        table,
        tuple(categories),
        tuple(numbers),
        word=draw.rng.choice(categories[0].values),
        amount=number.low + number.span * draw.rng.randint(2, 7) // 10,
        few=draw.rng.randint(2, 5),
    )


def _filled(view: View, draw: Draw) -> str:
    """The table with rows in it. No number comes twice, so that no order is left to chance."""
    columns: list[list[str]] = [[q(f"{view.table.one} {i}") for i in range(ROWS)]]
    columns += [[q(draw.rng.choice(column.values)) for _ in range(ROWS)] for column in view.categories]
    for number in view.numbers:
        step = max(1, number.span // (2 * ROWS))
        values = range(number.low, number.low + 2 * ROWS * step, step)
        columns.append([str(x) for x in draw.rng.sample(values, ROWS)])
    rows = ", ".join(f"({', '.join(row)})" for row in zip(*columns, strict=True))
    return f"{view.schema}; INSERT INTO {view.table.name} VALUES {rows};"


def rows(setup: str, query: str) -> list[Any] | None:
    """None for what is not one query that SQLite can run."""
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(setup)
        database.execute("PRAGMA query_only = ON")
        database.set_progress_handler(lambda: 1, 1000 * MOST_STEPS)
        return database.execute(query).fetchall() if query.strip() else None
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    finally:
        database.close()
