"""JSON from a note: a sentence or two about a person, an order, an event or a flight, and the keys that are wanted.

Names, places and goods are divided into trained and held-out ones, and so are the wordings. A key that the note says
nothing about is null.
"""

import json
from collections.abc import Callable
from typing import Any

from .draw import Draw, Example, words

FIRST = words(
    """Maria John Aisha Pedro Yuki Olga Samuel Ines Karim Lena Victor Chloe Diego Hannah Omar Priya Tomas
Nadia Felix Grace Ivan Julia Kofi Laura Mateo Nina Oscar Paula Rahul Sofia Theo Uma Walter Xenia
Yara Zoe Anton Bella Carlos Dora Emil Fatima George Helen Igor Jana Kenji Lucia Marco Noor
"""
)
LAST = words(
    """Lopez Smith Khan Silva Tanaka Petrov Adeyemi Costa Haddad Fischer Moreau Dubois Garcia Novak Ali
Sharma Kowalski Ivanova Weber Johnson Sokolov Rossi Mensah Olsen Fernandez Berg Larsen Santos Patel
Nguyen Keller Rao Brandt Popov Diallo Murphy Hansen Stone Vargas Lind Jensen Omar Clarke
Papadopoulos Virtanen Horvat Sato Bianchi Romano Aziz
"""
)
CITIES = words(
    """Lisbon Boston Lagos Madrid Osaka Prague Nairobi Porto Cairo Berlin Lyon Paris Bogota Vienna Dubai
Mumbai Krakow Moscow Hamburg Chicago Sofia Milan Accra Bergen Lima Malmo Oslo Toronto Pune Hanoi
Zurich Delhi Dresden Athens Dakar Dublin Aarhus Leeds Quito Turin Tampere Zagreb Kyoto Naples
"""
)
JOBS = words("""nurse teacher carpenter pilot chef lawyer baker dentist farmer painter plumber journalist architect
electrician librarian translator gardener engineer pharmacist photographer""")
GOODS = words(
    """lamps,notebooks,chairs,bicycles,candles,shirts,blankets,mugs,keyboards,tents,umbrellas,backpacks,clocks,
pillows,mirrors,scarves,kettles,headphones,helmets,carpets,vases,monitors,towels,gloves,ladders""",
    ",",
)
EVENTS = words(
    """concert,lecture,workshop,exhibition,wedding,conference,marathon,book fair,film night,auction,picnic,
reunion,job fair,chess tournament,poetry reading""",
    ",",
)
MONTHS = words("January February March April May June July August September October November December")
AIRLINES = words("Aerion Skyway Polar Sunjet Norvia Altair Zephyr Condora Meridian Volaria")
PAYMENTS = ["card", "cash", "bank transfer", "invoice", "voucher"]

Facts = dict[str, Any]
Note = tuple[str, Facts]


def _name(draw: Draw) -> str:
    return f"{draw.value(FIRST)} {draw.value(LAST)}"


def _an(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _time(draw: Draw) -> str:
    return f"{draw.rng.randint(7, 22):02}:{draw.rng.choice((0, 15, 30, 45)):02}"


def person(draw: Draw) -> Note:
    """A person with an age, a job, a city and children."""
    facts = {
        "name": _name(draw), "age": draw.rng.randint(19, 78), "job": draw.value(JOBS), "city": draw.value(CITIES),
        "children": draw.rng.randint(1, 5),
    }  # fmt: skip
    text = draw.template(
        [
            "{name}, {age}, works as {a_job} in {city} and has {children} {child}.",
            "{name} is {age} years old and lives in {city}. {name} is {a_job} with {children} {child}.",
            "Our new neighbour in {city} is {name}, {a_job}, aged {age}, with {children} {child}.",
            "I met {name} in {city}. At {age}, {name} still works as {a_job} and has {children} {child}.",
            "{name} ({age}), {a_job}, {children} {child}, {city}.",
            "In {city} there is {a_job} called {name}, who is {age} and has {children} {child}.",
        ],
        [
            "With {children} {child} at home, {name} of {city}, {a_job}, turns {age} today.",
            "At the age of {age} the {job} {name} moved to {city} with {children} {child}.",
        ],
    )
    child = "child" if facts["children"] == 1 else "children"
    return text.format(**facts, a_job=_an(facts["job"]), child=child), facts


def order(draw: Draw) -> Note:
    """An order with its customer, goods, number, price and payment."""
    facts = {
        "customer": _name(draw), "product": draw.value(GOODS), "quantity": draw.rng.randint(2, 90),
        "total": draw.rng.randint(10, 999), "payment": draw.any(PAYMENTS), "city": draw.value(CITIES),
    }  # fmt: skip
    text = draw.template(
        [
            "{customer} ordered {quantity} {product} for {total} euros, paid by {payment}, to be sent to {city}.",
            "Please send {quantity} {product} to {customer} in {city}. The total is {total} euros, by {payment}.",
            "New order from {customer}, {city}: {quantity} {product}, {total} euros, {payment}.",
            "We shipped {quantity} {product} to {city}. {customer} paid {total} euros by {payment}.",
            "By {payment}, {customer} from {city} bought {quantity} {product} and paid {total} euros.",
            "{total} euros came in by {payment} for {quantity} {product}, which {customer} wants in {city}.",
        ],
        [
            "A parcel with {quantity} {product} is on its way to {city}. {customer} paid {total} euros by {payment}.",
            "For {total} euros by {payment}, {quantity} {product} go to {customer} of {city}.",
        ],
    )
    return text.format(**facts), facts


def event(draw: Draw) -> Note:
    """An event with its date, time, place, price and host."""
    day, month = draw.rng.randint(1, 28), draw.any(MONTHS)
    facts = {
        "event": draw.value(EVENTS), "date": f"{day} {month}", "time": _time(draw), "city": draw.value(CITIES),
        "host": _name(draw), "price": draw.rng.randint(3, 95),
    }  # fmt: skip
    text = draw.template(
        [
            "The {event} takes place on {date} at {time} in {city}. {host} is the host, tickets cost {price} euros.",
            "{host} invites you to {a_event} in {city} on {date}, {time}. Entry: {price} euros.",
            "On {date} there is {a_event} in {city}, hosted by {host}. It starts at {time} and costs {price} euros.",
            "Don't miss the {event} by {host}: {city}, {date}, {time}, {price} euros.",
            "Tickets for the {event} in {city} on {date} at {time} are {price} euros, says {host}.",
        ],
        [
            "{city} will see {a_event} on {date}: {host} opens the doors at {time}, for {price} euros.",
            "Save the date: {date}, {time}, {event}, {city}. {price} euros at the door, ask for {host}.",
        ],
    )
    return text.format(**facts, a_event=_an(facts["event"])), facts


def flight(draw: Draw) -> Note:
    """A flight with its passenger, airline, cities, time and seat."""
    start = draw.value(CITIES)
    end = draw.value([city for city in CITIES if city != start])
    facts = {
        "passenger": _name(draw), "airline": draw.value(AIRLINES), "from": start, "to": end, "departure": _time(draw),
        "seat": f"{draw.rng.randint(1, 39)}{draw.rng.choice('ABCDEF')}",
    }  # fmt: skip
    text = draw.template(
        [
            "{passenger} flies with {airline} from {from} to {to} at {departure}, seat {seat}.",
            "{airline} flight from {from} to {to}: {passenger} has seat {seat}, departure {departure}.",
            "At {departure} {passenger} leaves {from} for {to} on {airline}, in seat {seat}.",
            "Seat {seat} on the {airline} flight to {to} is booked for {passenger}, leaving {from} at {departure}.",
        ],
        [
            "Boarding pass: {passenger}, {from} to {to}, {departure}, {seat}, {airline}.",
            "To {to} from {from} with {airline}, says the ticket of {passenger}; {departure}, seat {seat}.",
        ],
    )
    return text.format(**facts), facts


NOTES: list[Callable[[Draw], Note]] = [person, order, event, flight]
UNSAID = ["phone", "email", "website", "comment", "discount", "language"]


def example(draw: Draw) -> Example:
    """One note, the keys wanted in any order, and the object."""
    text, facts = draw.any(NOTES)(draw)
    keys = draw.rng.sample(list(facts), draw.rng.randint(2, len(facts)))
    if draw.rng.random() < 0.25:
        keys.insert(draw.rng.randint(0, len(keys)), draw.any(UNSAID))
    found = {key: facts.get(key) for key in keys}
    wanted = draw.template(["Keys: {}", "Extract as JSON: {}", "JSON with {}"], ["Give me JSON with the keys {}."])
    prompt = f"{text}\n{wanted.format(', '.join(keys))}"
    return Example(prompt, json.dumps(found, ensure_ascii=False), {"expected": found})
