"""The tables that questions are about: three lines each, which say how one speaks about rows and columns."""

from dataclasses import dataclass

# table | one | many | label column | categories: name/plural=values | numbers: name/phrase=low-high
_TABLES = """
employees|employee|employees|name
|department/departments=Sales,Marketing,Finance,Legal;city/cities=Boston,Denver,Austin,Seattle
|salary/salary=30000-120000;age/age=20-65
products|product|products|title
|category/categories=toys,books,garden,kitchen;brand/brands=Acme,Nordia,Velto,Zenix
|price/price=5-400;stock/stock=0-300
students|student|students|name
|major/majors=physics,history,biology,music;country/countries=France,Japan,Brazil,Kenya
|score/score=40-100;age/age=17-30
films|film|films|title
|genre/genres=comedy,drama,horror,western;director/directors=Lang,Varda,Ozu,Renoir
|year/year=1930-2020;length/length=60-200
orders|order|orders|reference
|status/statuses=open,paid,shipped,cancelled;customer/customers=Nowak,Silva,Khan,Olsen
|total/total=10-900;items/number of items=1-60
cars|car|cars|model
|colour/colours=red,blue,black,white;maker/makers=Lumo,Karsten,Ibara,Dole
|price/price=4000-60000;mileage/mileage=1000-200000
cities|city|cities|name
|country/countries=Italy,Spain,Poland,Chile;region/regions=north,south,east,west
|population/population=20000-900000;altitude/altitude=0-1500
books|book|books|title
|author/authors=Keller,Moreau,Sato,Ivanova;language/languages=English,French,German,Polish
|pages/number of pages=80-900;year/year=1950-2023
hotels|hotel|hotels|name
|city/cities=Rome,Lisbon,Oslo,Prague;kind/kinds=resort,hostel,boutique,motel
|rooms/number of rooms=10-300;stars/star rating=1-60
players|player|players|name
|team/teams=Lions,Hawks,Bears,Sharks;position/positions=goalkeeper,defender,midfielder,striker
|goals/number of goals=0-60;age/age=18-40
flights|flight|flights|number
|airline/airlines=Aerion,Skyway,Polar,Sunjet;destination/destinations=Cairo,Lima,Delhi,Oslo
|distance/distance=300-9000;seats/number of seats=50-400
songs|song|songs|title
|artist/artists=Luna,Miro,Vega,Tara;genre/genres=jazz,rock,folk,techno
|plays/number of plays=100-90000;length/length=90-500
animals|animal|animals|name
|species/species=lion,otter,zebra,owl;keeper/keepers=Ada,Ben,Cleo,Dan
|weight/weight=1-400;age/age=1-60
patients|patient|patients|name
|ward/wards=A,B,C,D;doctor/doctors=Reed,Lopez,Singh,Berg
|age/age=1-95;temperature/temperature=35-99
invoices|invoice|invoices|code
|client/clients=Orbit,Delta,Nimbus,Quill;currency/currencies=EUR,USD,GBP,JPY
|amount/amount=50-9000;days_late/number of days late=0-90
restaurants|restaurant|restaurants|name
|cuisine/cuisines=Thai,Greek,Mexican,Indian;district/districts=Old Town,Harbour,Hill,Park
|rating/rating=1-99;seats/number of seats=10-200
courses|course|courses|title
|teacher/teachers=Adams,Brown,Clark,Davis;room/rooms=R1,R2,R3,R4
|credits/number of credits=1-60;enrolled/enrolment=5-200
trees|tree|trees|label
|species/species=oak,birch,pine,maple;park/parks=Central,Riverside,Lakeside,Hilltop
|height/height=2-60;age/age=5-300
servers|server|servers|hostname
|status/statuses=up,down,idle,draining;datacenter/datacenters=fra1,ams2,nyc3,sgp1
|memory/memory=4-512;cores/number of cores=2-128
rivers|river|rivers|name
|continent/continents=Europe,Asia,Africa,Oceania;sea/seas=Baltic,Black,Red,North
|length/length=100-6000;depth/depth=2-90
tickets|ticket|tickets|subject
|priority/priorities=low,normal,high,urgent;agent/agents=Mia,Noah,Lea,Finn
|hours/number of hours=1-100;replies/number of replies=0-60
museums|museum|museums|name
|city/cities=Vienna,Madrid,Athens,Dublin;theme/themes=art,science,history,design
|visitors/number of visitors=1000-900000;fee/fee=0-60
recipes|recipe|recipes|title
|course/courses=starter,main,dessert,snack;cook/cooks=Ines,Hugo,Olga,Pavel
|minutes/number of minutes=5-180;calories/number of calories=80-1200
houses|house|houses|address
|owner/owners=Meyer,Rossi,Dubois,Larsen;style/styles=modern,victorian,cottage,loft
|price/price=90000-900000;area/area=40-400
planets|planet|planets|name
|kind/kinds=rocky,gas,ice,dwarf;system/systems=Sol,Vega,Rigel,Kepler
|moons/number of moons=0-80;radius/radius=1000-70000
ships|ship|ships|name
|flag/flags=Panama,Malta,Norway,Greece;kind/kinds=tanker,ferry,cargo,cruise
|tonnage/tonnage=500-90000;crew/crew size=5-900
phones|phone|phones|model
|maker/makers=Ario,Bexa,Conta,Dyna;system/systems=A1,B2,C3,D4
|price/price=90-1500;storage/storage=16-1024
farms|farm|farms|name
|crop/crops=wheat,maize,rice,barley;county/counties=Kent,Devon,Essex,Surrey
|acres/number of acres=5-900;workers/number of workers=1-60
concerts|concert|concerts|title
|venue/venues=Arena,Opera,Club,Park;band/bands=Echo,Nova,Pulse,Drift
|tickets_sold/number of tickets sold=50-20000;price/price=5-200
bridges|bridge|bridges|name
|material/materials=steel,stone,wood,concrete;river/rivers=Rhine,Seine,Volga,Po
|length/length=20-2000;year/year=1800-2015
"""


@dataclass(frozen=True)
class Category:
    """A column of words; `plural` is what one calls several of them."""

    name: str
    plural: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Number:
    """A column of integers from `low` on; `phrase` is what one calls it."""

    name: str
    phrase: str
    low: int
    span: int


@dataclass(frozen=True)
class Table:
    """A table, how one speaks about one of its rows and about many, and its columns."""

    name: str
    one: str
    many: str
    label: str
    categories: tuple[Category, ...]
    numbers: tuple[Number, ...]


def _table(line: str) -> Table:
    name, one, many, label, categories, numbers = line.split("|")
    return Table(name, one, many, label, tuple(map(_category, categories.split(";"))),
                 tuple(map(_number, numbers.split(";"))))  # fmt: skip


def _category(text: str) -> Category:
    names, _, values = text.partition("=")
    name, plural = names.split("/")
    return Category(name, plural, tuple(values.split(",")))


def _number(text: str) -> Number:
    names, _, bounds = text.partition("=")
    name, phrase = names.split("/")
    low, high = map(int, bounds.split("-"))
    return Number(name, phrase, low, high - low)


TABLES = [_table(line) for line in _TABLES.strip().replace("\n|", "|").splitlines()]
