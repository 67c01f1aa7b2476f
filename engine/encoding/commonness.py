"""How much a word says: a prior for query weights where no collection statistics exist.

Four lists of English words by how commonly they occur in running text of any subject, from function words to the ordinary
vocabulary of explaining things, and a rule for all the others. Written by hand for this project, not counted from a corpus, so that
no collection has an advantage. Called by hashing.py only. A word in no list is taken for a subject word.

What is still unsatisfying: `cell` in biology or `frequency` in radio is as common as `because`, and no general list can know; BM25 counts
the collection and does. README.md says how much that costs.
"""

from __future__ import annotations

from functools import cache

from engine.encoding.words import stem

FUNCTION_WORDS = """
a about above after again against all along am among an and any are around as at be because been before being below beneath beside
between beyond both but by can cannot cant could couldnt did didnt do does doesnt doing dont down during each either else etc ever every
for from had hadnt has hasnt have havent having he her here hers herself him himself his how i if im in inside into is isnt it its
itself ive just ll may me might mine must my myself neither no nor not of off on onto or other our ours ourselves out over own per quite
rather re s shall she should shouldnt since so some such t than that thats the their theirs them themselves then there theres these they
this those though through thus to too toward towards under unless until unto up upon us ve very via was wasnt we were werent what
whatever when whenever where whereas wherever whether which whichever while who whoever whom whose why will with within without wont
would wouldnt yes yet you your yours yourself d m
"""

EVERYDAY_WORDS = """
able across actually almost alone already also although always amount another anybody anyone anything anyway apart appear ask available
away back based become becomes became begin began begun best better big bit bring brought call called came certain certainly come comes
common contain contains different done due early easily easy effect end enough entire especially even everybody everyone everything
example except far few find finding finds first following follow form found fully further furthermore gave general generally get gets
getting give given gives giving go goes going gone good got great half happen happened hence high however important include included
includes including indeed instead involve involved keep keeps kept kind knew know known large larger largest last late later least left
less let like likely little long longer look lot low lower made main mainly make makes making many matter maybe mean means mere merely
moreover more most mostly mr mrs much name namely near nearly need needed needs never nevertheless new next nobody none nothing now
number obtain obtained occur occurs often old once one ones only open order ordinary otherwise overall part particular particularly
perhaps place please plus point possible possibly present previous previously probably provide provided provides put quickly really
recent recently relate related relatively respectively result results right run said same saw say says second see seem seems seen set
several short show showed shown shows side similar similarly simple simply small smaller somebody someone something sometimes soon still
suggest take taken takes taking tell tend terms thing things think third thought three time times together told took try turn two type
types typical typically unlike use used useful user uses using usual usually various versus want wants way ways well went whole wide
word work works year years zero four five six seven eight nine ten hundred thousand million 1 2 3 4 5 6 7 8 9 0 10 100
"""

EXPLAINING_WORDS = """
ability access according account achieve act action activity actual add added addition additional address adopt advance advantage affect
age aim allow analyse analysis analyze answer apply application approach appropriate area argue arise aspect assess assume assumption
attempt attention author average avoid aware basic basis benefit body book build building built capable carry case cause caused causes
central century challenge chance change character characteristic choice choose circumstance city claim class clear close collect
combination combine compare comparison complete complex component comprise concern conclude conclusion condition conduct confirm
consequence consider consist constant context continue contrast contribute contribution control correct correspond cost country course
cover create critical current data date day deal decide decrease deep define degree demonstrate depend describe description design
desire detail detect determine develop development device difference difficult direct direction discover discuss discussion distinct
divide document draw drive effective effort element emerge employ enable encounter enhance ensure equal error essential establish
estimate evaluate event evidence exact examine exceed exhibit exist expect experience experiment experimental explain explore express
extend extent face fact factor fail fall family feature feel field figure final fit focus force free frequent full function fundamental
future gain generate goal group grow growth guide hand hard head help hold home house human idea identify illustrate impact implement
imply improve improvement increase increased indicate individual influence information initial input interest interpret introduce
introduction investigate investigation issue item job join key knowledge lack language lead learn level life light limit limitation line
link list live local location loss maintain major man manner mark material maximum measure measurement measurements mechanism meet
member men method minimum model modern move multiple natural nature necessary normal note notable novel objective observe observed offer
operate operation option original outcome output paper past path pattern pay people percent perform performance period person pick
picture piece plan play population position positive practical practice predict prepare presence pressure prevent primary principle
prior problem procedure process produce product production progress project promote proper property proportion propose protect prove
public publish purpose quality quantity question quick range rapid rate reach read real realize reason receive recognise recognize
recommend record reduce reduction refer reflect region regard relation relationship relevant reliable remain remove repeat replace
report represent require requirement research resource respect respond response restrict reveal review rise role rule sample scale
science section seek select selection send sense separate series serve shape share significant significantly single site situation size
solution solve sort sound source space special specific spend stage stand standard start state statement step stop strategy strength
strong structure student study subject success successful suitable sum summary supply support surface survey system table talk target
task technical technique technology term test text theory topic total traditional train treat trend true understand unit usage value
variable variation variety vary version view visit wait walk water week widely woman women world write young association associate
percentage comparative conventional corresponding theoretical mathematical efficient efficiency modification
"""


FAMILIAR_WORDS = """
adult air amplifier animal antenna apple arm army art atom automatic baby bacteria bag ball band bank bar battery beam bean bear bed bee
bird birth black block blood blue board boat bone bottle boundary bowl box boy brain branch bread break bridge bright brown brush bubble
bus business cake calculate calculation camera cancer capacity car carbon card cat cell chain chair channel charge chart cheese chemical
chemistry child church circle circuit clean climate clinical clock cloth cloud coal coast code coffee coil cold colour color column
company computer conductor connection content cook cool copper corn correlation cow cross crystal culture curve cycle damage dance
danger dark daughter dead death decay density desert digital digit dinner dirt disease dish display distance distribution doctor dog
door double drink drop drug dry dust ear earth east economy edge education egg electric electrical electricity electron electronic
electronics emission empty energy engine engineer environment equation equipment evening evolution exercise expression external eye farm
fast fat father fear female fibre fiber filter finger fire fish flat flight flow floor flour flower fluid fly food foot forest frame
frequency fresh friend frog fruit fuel game garden gas gate gene generation genetic girl glass gold government grain graph grass gravity
green ground gun hair hat health healthy hear heart heat heavy height hill history hole horse hospital hot hour ice image index industry
infection insect instrument internal internet iron island journey judge jump kill king kitchen lake land laser law layer leaf leather
leg lens letter library lifetime lightning linear liquid listen liver load logic lung machine magnetic male map market mass mathematics
meat media medical medicine memory message metal milk mineral minute mirror mix mixture molecule money month moon morning mother motion
motor mountain mouse mouth music nation navy neck needle negative nerve nest network night noise north nose nuclear ocean office oil
orange organ organism oven oxygen page pain paint pan parallel parent park particle patient peace phase phone photograph physical
physics pipe plane planet plastic plate police political pollution poor port pot potential pound powder power price print prison
probability program protein pull pulse pump pure push radiation radio railway rain random ratio ray reaction receiver red reflection
religion resistance resonance rice rich ring risk river road rock room root rope round royal rural safe safety salt sand satellite
school screen sea search season seed sensor server shadow ship shoe shop signal silicon silk silver skin sky sleep slow smell smoke
smooth snow society soft software soil solar soldier solid son song soup south speaker species spectrum speed spin sport spread spring
square stable star steam steel stem stock stomach stone storage storm story street stress sugar summer sun sweet swim switch symbol
symptom tail tank taste tax tea teacher team telephone television temperature therapy thick thin tissue tool tooth touch tower town toy
track trade traffic transfer transform transmission transmitter transport travel treatment tree trip tube ultimate uniform universe
university urban vaccine vacuum valley valve vector vegetable vehicle vein velocity vessel village virus visible vitamin voice voltage
volume wall war warm wash waste watch wave wavelength weather weight wet wheat wheel white wind window wing winter wire wood wool yellow
zone
"""


_BANDS = ((FUNCTION_WORDS, 0.05), (EVERYDAY_WORDS, 0.3), (EXPLAINING_WORDS, 0.5), (FAMILIAR_WORDS, 0.75))
"""Shares of a subject word's weight. Chosen by nDCG@10 on SciFact, NPL and arXiv titles together (README.md): flat around these values."""


@cache
def weights() -> dict[str, float]:
    """The share of a full weight that each listed stem has (of two lists, the commoner). About 10 ms, once."""
    table: dict[str, float] = {}
    for listed, share in reversed(_BANDS):
        table.update((stem(word), share) for word in listed.split())
    return table


def weight(stemmed: str) -> float:
    """0.05 for a function word to 1 for a word in no list."""
    return weights().get(stemmed, 1.0)
