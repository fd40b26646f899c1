"""What the demo model knows: plain tables, one line per item, and the French that goes with them."""

from __future__ import annotations

# name | capital | continent | currency | a language spoken there | French name | French capital
COUNTRIES = """
France|Paris|Europe|euro|French|la France|Paris
Germany|Berlin|Europe|euro|German|l'Allemagne|Berlin
Italy|Rome|Europe|euro|Italian|l'Italie|Rome
Spain|Madrid|Europe|euro|Spanish|l'Espagne|Madrid
Portugal|Lisbon|Europe|euro|Portuguese|le Portugal|Lisbonne
the Netherlands|Amsterdam|Europe|euro|Dutch|les Pays-Bas|Amsterdam
Austria|Vienna|Europe|euro|German|l'Autriche|Vienne
Greece|Athens|Europe|euro|Greek|la Grèce|Athènes
Ireland|Dublin|Europe|euro|English|l'Irlande|Dublin
Finland|Helsinki|Europe|euro|Finnish|la Finlande|Helsinki
Croatia|Zagreb|Europe|euro|Croatian|la Croatie|Zagreb
Norway|Oslo|Europe|Norwegian krone|Norwegian|la Norvège|Oslo
Sweden|Stockholm|Europe|Swedish krona|Swedish|la Suède|Stockholm
Denmark|Copenhagen|Europe|Danish krone|Danish|le Danemark|Copenhague
Iceland|Reykjavik|Europe|Icelandic krona|Icelandic|l'Islande|Reykjavik
Poland|Warsaw|Europe|zloty|Polish|la Pologne|Varsovie
Hungary|Budapest|Europe|forint|Hungarian|la Hongrie|Budapest
Czechia|Prague|Europe|Czech koruna|Czech|la Tchéquie|Prague
Romania|Bucharest|Europe|Romanian leu|Romanian|la Roumanie|Bucarest
Serbia|Belgrade|Europe|Serbian dinar|Serbian|la Serbie|Belgrade
the United Kingdom|London|Europe|pound sterling|English|le Royaume-Uni|Londres
Ukraine|Kyiv|Europe|hryvnia|Ukrainian|l'Ukraine|Kyiv
Japan|Tokyo|Asia|yen|Japanese|le Japon|Tokyo
China|Beijing|Asia|yuan|Chinese|la Chine|Pékin
South Korea|Seoul|Asia|won|Korean|la Corée du Sud|Séoul
India|New Delhi|Asia|Indian rupee|Hindi|l'Inde|New Delhi
Thailand|Bangkok|Asia|baht|Thai|la Thaïlande|Bangkok
Vietnam|Hanoi|Asia|dong|Vietnamese|le Vietnam|Hanoï
Mongolia|Ulaanbaatar|Asia|tugrik|Mongolian|la Mongolie|Oulan-Bator
Nepal|Kathmandu|Asia|Nepalese rupee|Nepali|le Népal|Katmandou
Iran|Tehran|Asia|Iranian rial|Persian|l'Iran|Téhéran
Iraq|Baghdad|Asia|Iraqi dinar|Arabic|l'Irak|Bagdad
the Philippines|Manila|Asia|Philippine peso|Filipino|les Philippines|Manille
Egypt|Cairo|Africa|Egyptian pound|Arabic|l'Égypte|Le Caire
Morocco|Rabat|Africa|Moroccan dirham|Arabic|le Maroc|Rabat
Tunisia|Tunis|Africa|Tunisian dinar|Arabic|la Tunisie|Tunis
Algeria|Algiers|Africa|Algerian dinar|Arabic|l'Algérie|Alger
Kenya|Nairobi|Africa|Kenyan shilling|Swahili|le Kenya|Nairobi
Ethiopia|Addis Ababa|Africa|birr|Amharic|l'Éthiopie|Addis-Abeba
Ghana|Accra|Africa|cedi|English|le Ghana|Accra
Nigeria|Abuja|Africa|naira|English|le Nigeria|Abuja
Senegal|Dakar|Africa|CFA franc|French|le Sénégal|Dakar
Canada|Ottawa|North America|Canadian dollar|English|le Canada|Ottawa
the United States|Washington|North America|US dollar|English|les États-Unis|Washington
Mexico|Mexico City|North America|Mexican peso|Spanish|le Mexique|Mexico
Cuba|Havana|North America|Cuban peso|Spanish|Cuba|La Havane
Jamaica|Kingston|North America|Jamaican dollar|English|la Jamaïque|Kingston
Brazil|Brasilia|South America|real|Portuguese|le Brésil|Brasilia
Argentina|Buenos Aires|South America|Argentine peso|Spanish|l'Argentine|Buenos Aires
Chile|Santiago|South America|Chilean peso|Spanish|le Chili|Santiago
Peru|Lima|South America|sol|Spanish|le Pérou|Lima
Colombia|Bogota|South America|Colombian peso|Spanish|la Colombie|Bogota
Ecuador|Quito|South America|US dollar|Spanish|l'Équateur|Quito
Uruguay|Montevideo|South America|Uruguayan peso|Spanish|l'Uruguay|Montevideo
Australia|Canberra|Oceania|Australian dollar|English|l'Australie|Canberra
New Zealand|Wellington|Oceania|New Zealand dollar|English|la Nouvelle-Zélande|Wellington
Fiji|Suva|Oceania|Fijian dollar|Fijian|les Fidji|Suva
"""

# continent | in French, with its preposition
CONTINENTS = """
Europe|en Europe
Asia|en Asie
Africa|en Afrique
North America|en Amérique du Nord
South America|en Amérique du Sud
Oceania|en Océanie
"""

# currency | in French, with its article
CURRENCIES = """
euro|l'euro
Norwegian krone|la couronne norvégienne
Swedish krona|la couronne suédoise
Danish krone|la couronne danoise
Icelandic krona|la couronne islandaise
zloty|le zloty
forint|le forint
Czech koruna|la couronne tchèque
Romanian leu|le leu roumain
Serbian dinar|le dinar serbe
pound sterling|la livre sterling
hryvnia|la hryvnia
yen|le yen
yuan|le yuan
won|le won
Indian rupee|la roupie indienne
baht|le baht
dong|le dong
tugrik|le tugrik
Nepalese rupee|la roupie népalaise
Iranian rial|le rial iranien
Iraqi dinar|le dinar irakien
Philippine peso|le peso philippin
Egyptian pound|la livre égyptienne
Moroccan dirham|le dirham marocain
Tunisian dinar|le dinar tunisien
Algerian dinar|le dinar algérien
Kenyan shilling|le shilling kényan
birr|le birr
cedi|le cedi
naira|le naira
CFA franc|le franc CFA
Canadian dollar|le dollar canadien
US dollar|le dollar américain
Mexican peso|le peso mexicain
Cuban peso|le peso cubain
Jamaican dollar|le dollar jamaïcain
real|le réal
Argentine peso|le peso argentin
Chilean peso|le peso chilien
sol|le sol
Colombian peso|le peso colombien
Uruguayan peso|le peso uruguayen
Australian dollar|le dollar australien
New Zealand dollar|le dollar néo-zélandais
Fijian dollar|le dollar fidjien
"""

# language | in French
LANGUAGES = """
French|français
German|allemand
Italian|italien
Spanish|espagnol
Portuguese|portugais
Dutch|néerlandais
Greek|grec
English|anglais
Finnish|finnois
Croatian|croate
Norwegian|norvégien
Swedish|suédois
Danish|danois
Icelandic|islandais
Polish|polonais
Hungarian|hongrois
Czech|tchèque
Romanian|roumain
Serbian|serbe
Ukrainian|ukrainien
Japanese|japonais
Chinese|chinois
Korean|coréen
Hindi|hindi
Thai|thaï
Vietnamese|vietnamien
Mongolian|mongol
Nepali|népalais
Persian|persan
Arabic|arabe
Filipino|filipino
Swahili|swahili
Amharic|amharique
Fijian|fidjien
"""

# thing | is or are | colour | the French sentence
COLOURS = """
the sky|is|blue|Le ciel est bleu.
the sea|is|blue|La mer est bleue.
grass|is|green|L'herbe est verte.
snow|is|white|La neige est blanche.
milk|is|white|Le lait est blanc.
coal|is|black|Le charbon est noir.
blood|is|red|Le sang est rouge.
the sun|is|yellow|Le soleil est jaune.
chocolate|is|brown|Le chocolat est brun.
bananas|are|yellow|Les bananes sont jaunes.
carrots|are|orange|Les carottes sont orange.
tomatoes|are|red|Les tomates sont rouges.
"""

# word | its opposite | word in French | opposite in French
OPPOSITES = """
hot|cold|chaud|froid
big|small|grand|petit
fast|slow|rapide|lent
old|young|vieux|jeune
rich|poor|riche|pauvre
full|empty|plein|vide
open|closed|ouvert|fermé
wet|dry|mouillé|sec
light|dark|clair|sombre
easy|hard|facile|difficile
happy|sad|heureux|triste
strong|weak|fort|faible
"""

WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
SEMAINE = "lundi mardi mercredi jeudi vendredi samedi dimanche"
MONTHS = "January February March April May June July August September October November December"
MOIS = "janvier février mars avril mai juin juillet août septembre octobre novembre décembre"


def rows(table: str) -> list[list[str]]:
    """The lines of one of the tables above, each cut into its fields."""
    return [line.split("|") for line in table.strip().splitlines()]


def mapping(table: str) -> dict[str, str]:
    """A table of two columns: from the first to the second."""
    return {first: second for first, second in rows(table)}  # noqa: C416  (rows are lists, not pairs)
