"""The words of the French grammar: each English one with what French needs to know about it."""

from dataclasses import dataclass

from .draw import words

_NOUNS = """
cat|cats|chat|m
dog|dogs|chien|m
bird|birds|oiseau|m|oiseaux
horse|horses|cheval|m|chevaux
house|houses|maison|f
car|cars|voiture|f
book|books|livre|m
table|tables|table|f
chair|chairs|chaise|f
window|windows|fenêtre|f
door|doors|porte|f
apple|apples|pomme|f
cake|cakes|gâteau|m|gâteaux
flower|flowers|fleur|f
tree|trees|arbre|m
key|keys|clé|f
hat|hats|chapeau|m|chapeaux
shirt|shirts|chemise|f
dress|dresses|robe|f
shoe|shoes|chaussure|f
bag|bags|sac|m
letter|letters|lettre|f
newspaper|newspapers|journal|m|journaux
picture|pictures|image|f
boat|boats|bateau|m|bateaux
train|trains|train|m
bicycle|bicycles|vélo|m
bottle|bottles|bouteille|f
glass|glasses|verre|m
plate|plates|assiette|f
knife|knives|couteau|m|couteaux
lamp|lamps|lampe|f
bed|beds|lit|m
child|children|enfant|m
teacher|teachers|professeur|m
friend|friends|ami|m
shop|shops|magasin|m
church|churches|église|f
bridge|bridges|pont|m
garden|gardens|jardin|m
"""

# feminine | masculine plural | feminine plural follow a rule unless given; "before": stands before the noun
_ADJECTIVES = """
red|rouge|rouge
green|vert|verte
black|noir|noire
white|blanc|blanche
blue|bleu|bleue
small|petit|petite|before
big|grand|grande|before
pretty|joli|jolie|before
young|jeune|jeune|before
bad|mauvais|mauvaise|before
expensive|cher|chère
heavy|lourd|lourde
clean|propre|propre
dirty|sale|sale
empty|vide|vide
quiet|calme|calme
strong|fort|forte
warm|chaud|chaude
cold|froid|froide
light|léger|légère
strange|étrange|étrange
modern|moderne|moderne
round|rond|ronde
broken|cassé|cassée
"""

# third person | I, you, he/she, we, they | infinitive (English base form)
_VERBS = """
see|sees|vois|voyez|voit|voyons|voient|voir
buy|buys|achète|achetez|achète|achetons|achètent|acheter
want|wants|veux|voulez|veut|voulons|veulent|vouloir
have|has|ai|avez|a|avons|ont|avoir
look for|looks for|cherche|cherchez|cherche|cherchons|cherchent|chercher
sell|sells|vends|vendez|vend|vendons|vendent|vendre
draw|draws|dessine|dessinez|dessine|dessinons|dessinent|dessiner
find|finds|trouve|trouvez|trouve|trouvons|trouvent|trouver
choose|chooses|choisis|choisissez|choisit|choisissons|choisissent|choisir
take|takes|prends|prenez|prend|prenons|prennent|prendre
wash|washes|lave|lavez|lave|lavons|lavent|laver
carry|carries|porte|portez|porte|portons|portent|porter
lose|loses|perds|perdez|perd|perdons|perdent|perdre
give|gives|donne|donnez|donne|donnons|donnent|donner
like|likes|aime|aimez|aime|aimons|aiment|aimer
"""

# English | French | form of the verb, counted from 0
_SUBJECTS = """
I|je|0
you|vous|1
he|il|2
she|elle|2
we|nous|3
they|ils|4
Marie|Marie|2
Paul|Paul|2
my sister|ma sœur|2
my brother|mon frère|2
our neighbour|notre voisin|2
my parents|mes parents|4
the children|les enfants|4
her friends|ses amis|4
"""

_PLACES = """
in the garden|dans le jardin
in the house|dans la maison
in the kitchen|dans la cuisine
in the street|dans la rue
in the car|dans la voiture
in the park|dans le parc
under the table|sous la table
on the chair|sur la chaise
behind the door|derrière la porte
in front of the church|devant l'église
at the market|au marché
at school|à l'école
at the station|à la gare
near the bridge|près du pont
near the window|près de la fenêtre
in the bag|dans le sac
"""

_TIMES = """
today|aujourd'hui
this morning|ce matin
this evening|ce soir
every day|tous les jours
on Monday|lundi
on Saturday|samedi
now|maintenant
in winter|en hiver
in summer|en été
"""

_CITIES = """
in Paris|à Paris
in London|à Londres
in Rome|à Rome
in France|en France
in Italy|en Italie
in Spain|en Espagne
in Germany|en Allemagne
in Japan|au Japon
in Canada|au Canada
in Brazil|au Brésil
in the United States|aux États-Unis
in Lyon|à Lyon
"""

_ACTIONS = """
sleep|dormir
eat|manger
work|travailler
dance|danser
sing|chanter
read|lire
write|écrire
cook|cuisiner
swim|nager
leave|partir
wait|attendre
play|jouer
travel|voyager
"""

NUMBERS = words("two three four five six seven eight nine ten eleven twelve")
NOMBRES = words("deux trois quatre cinq six sept huit neuf dix onze douze")


@dataclass(frozen=True)
class Noun:
    """A noun in both languages; `gender` is m or f."""

    one: str
    many: str
    singular: str
    plural: str
    gender: str

    @property
    def elides(self) -> bool:
        return self.singular[0] in "aeiouéêâh"


@dataclass(frozen=True)
class Adjective:
    """An adjective in both languages, masculine and feminine."""

    english: str
    masculine: str
    feminine: str
    before: bool

    def form(self, gender: str, plural: bool) -> str:
        word = self.feminine if gender == "f" else self.masculine
        return word if not plural or word.endswith("s") else f"{word}s"


@dataclass(frozen=True)
class Verb:
    """A verb: the English base form and third person, the French present by person, the infinitive."""

    base: str
    third: str
    present: tuple[str, ...]
    infinitive: str


@dataclass(frozen=True)
class Subject:
    """Who does something; `person` chooses the form of a French verb."""

    english: str
    french: str
    person: int

    @property
    def third(self) -> bool:
        return self.person == 2


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().splitlines()]


def _noun(one: str, many: str, singular: str, gender: str, plural: str = "") -> Noun:
    return Noun(one, many, singular, plural or f"{singular}s", gender)


def _adjective(english: str, masculine: str, feminine: str, before: str = "") -> Adjective:
    return Adjective(english, masculine, feminine, bool(before))


def _verb(base: str, third: str, *forms: str) -> Verb:
    return Verb(base, third, forms[:5], forms[5])


NOUNS = [_noun(*row) for row in _rows(_NOUNS)]
ADJECTIVES = [_adjective(*row) for row in _rows(_ADJECTIVES)]
VERBS = [_verb(*row) for row in _rows(_VERBS)]
SUBJECTS = [Subject(english, french, int(person)) for english, french, person in _rows(_SUBJECTS)]
PLACES = [(english, french) for english, french in _rows(_PLACES)]
TIMES = [(english, french) for english, french in _rows(_TIMES)]
CITIES = [(english, french) for english, french in _rows(_CITIES)]
ACTIONS = [(english, french) for english, french in _rows(_ACTIONS)]
