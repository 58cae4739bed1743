# ruff: noqa: E501, SIM905 - tables of words and phrases read better unbroken
"""The text on which the embedded base model is pretrained: many kinds of made-up English, from a seed.

It is meant to teach what fine-tuning takes for granted (spelling, grammar, numbers and dates, and above all to copy
the fields of a record into a sentence) without the subject, the field names or the names of the demo data. Nothing is
copied from anywhere and no person is named. A document is one string without the end-of-text token.
"""

import re
from collections.abc import Callable, Iterator

from trainer.data.demo import MONTHS, Dice

NOUNS = """apple arch ash attic axe badge bag bakery ball banner barn barrel basin basket bay bean bed bell bench bicycle
blanket boat bolt bone book boot bottle bowl box branch bread brick bridge broom brush bucket building bulb bush
button cabin cable cake canal candle canoe cap carpet cart castle cave cellar chain chair chalk chart cheese chest
chimney church circle city clay cliff clock cloth cloud coat coin collar comb copper corn corner cottage cotton
council counter cow crane crate creek crown cup curtain cushion dam desk dish ditch dock door drawer drum dust eagle
edge egg engine envelope estate factory fan farm feather fence ferry field figure filter finger fire fish flag flame
flask floor flour flower fog forest fork fountain fox frame fruit furnace garage garden gate gear glove goat gold
grain grass gravel group guard guitar hall hammer harbour hat hay hedge helmet herd hill hook horn horse hospital
hotel house ice ink inn iron island jacket jar jewel journal jug kettle key kitchen kite knife knot ladder lake lamp
lane lantern leaf leather lemon lens letter library lid light lime line lock log loom machine magnet map marble
market mask mat meadow melon metal mill mine mirror moon motor mountain mud museum mushroom nail needle nest net
notebook oak oar oats ocean office oil olive onion orchard oven owl paddle paint palace pan paper parcel park path
pear pebble pen pepper piano picture pier pillow pine pipe plank plant plate plough pocket pond pot potato prison
pump puzzle quarry rail rain rope roof room root rose ruler saddle sail salt sand sauce saw scale school screen sea
seed shed sheep shelf shell ship shirt shoe shop shore shovel silk silver sink sky sled smoke snow soap sock soil
song soup spade spoon spring square stable stage stair stamp star station steam stone storm stove straw stream
street string sugar sun table tailor tank tea tent thread tile timber tin tool torch tower town toy track train tray
tree trench truck tunnel turtle umbrella valley van vase vehicle village vine violin wagon wall watch water wave wax
weapon well whale wheat wheel whistle wind window wire wolf wood wool worker workshop yard""".split()
ADJECTIVES = """amber ancient armed big black blue bold brass brave bright broad broken brown busy calm careful cheap clean clear
clever cold common cool curved damp dark deep dry dusty early eastern empty even fair famous fast flat fresh frozen
full gentle giant golden grand green grey happy hard heavy hidden hollow honest hot huge idle iron large late lazy
light local lonely long loud low lucky main mild military modern narrow neat new noisy northern old open orange pale
patient peaceful plain polite poor pretty proud public purple quick quiet rapid rare red rich ripe rough round rusty
sad safe salty sharp shiny short silent silver simple slow small smooth soft solid southern spare square steady
steep sticky still strange strong sunny sweet tall tame thick thin tiny tired unidentified unknown useful violent
warm weak western wet white wide wild wise wooden yellow young""".split()
VERBS = """admired arranged attacked avoided borrowed bought broke brought built buried called captured carried carved caught
chased checked cleaned closed collected copied counted covered crossed cut delivered described destroyed discovered
divided dragged drew dropped emptied entered established examined exchanged filled finished fixed followed forgot
found gathered guarded held hid invited joined kept left lifted lit loaded locked looked lost made marked measured
mended missed moved named noticed opened ordered packed painted passed picked placed planted polished pressed
protected provided pulled pushed raised reached released removed repaired replaced reported returned rolled sent set
shared showed shut sold sorted spilled stacked started stole stopped stored supported threw tied took touched traded
turned used visited washed watched weighed wrapped""".split()
PEOPLE = """baker builder captain carpenter cook driver engineer farmer fisher gardener guard guide judge librarian mechanic
miller miner nurse officer painter pilot plumber porter potter printer sailor scientist shepherd shopkeeper smith
soldier student tailor teacher trader traveller villager visitor watchman weaver writer""".split()
ADVERBS = "again almost alone always carefully early gently late never often once quickly quietly slowly soon suddenly twice".split()
WHEN = "[in the morning|in the evening|at night|at noon|after lunch|before dawn|after the rain|during the storm|for several hours|all day|every week|on the way home]"
PLACE = "[in|near|behind|beside|in front of|outside|at] the [{a} |]{n}"
UNITS = "mm cm m km g kg t ml l s min h days pieces boxes litres metres pounds degrees percent".split()
TOPICS = """colour material shape owner status category model size weight price code shelf label origin grade batch speed height
depth route platform gate zone climate diet habitat language currency crop signal channel voltage capacity pressure
season keeper rank score title""".split()
ONSETS = "b bl br c ch d dr f fl g gl gr h j k kr l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
VOWELS = "a a a e e e i i o o u ai au ea ee ie oa oo ou".split()
CODAS = [
    "",
    "",
    "",
    "b",
    "ck",
    "d",
    "ff",
    "g",
    "l",
    "ll",
    "m",
    "mp",
    "n",
    "nd",
    "ng",
    "nt",
    "p",
    "r",
    "rk",
    "rn",
    "s",
    "sh",
    "ss",
    "st",
    "t",
    "th",
    "x",
]

# Records: {field: kind of value}, then what is said of them. <field> is replaced by the value above it.
DOMAINS: tuple[tuple[dict[str, str], tuple[str, ...]], ...] = (
    ({"Parcel": "code", "Sent": "date", "From": "name", "To": "name", "Weight": "measure", "Content": "thing", "Carrier": "firm"},
     ("[On <Sent>, |]<Carrier> [took|shipped|sent] parcel <Parcel> [of <Weight> |]from <From> to <To>.", "The parcel holds <Content>.",
      "Parcel <Parcel> [left|was sent from] <From> on <Sent>[ and weighs <Weight>|].")),
    ({"Object": "thing", "Acquired": "date", "Found": "name", "Museum": "firm", "Age": "number", "Condition": "adjective"},
     ("On <Acquired>, <Museum> [acquired|bought|was given] <Object> found [in|near] <Found>.", "<Object> from <Found> is <Age> years old and in <Condition> condition.",
      "Around <Acquired>, <Object> came to <Museum>.")),
    ({"Train": "code", "Departs": "time", "Arrives": "time", "From": "name", "To": "name", "Platform": "number"},
     ("Train <Train> leaves <From> at <Departs> from platform <Platform> and [reaches|arrives in] <To> at <Arrives>.", "The train to <To> is <Train>.")),
    ({"Match day": "date", "Home": "name", "Guests": "name", "Score": "score", "Ground": "firm", "Spectators": "number"},
     ("On <Match day>, <Home> [met|played|hosted] <Guests> at <Ground>.", "The score was <Score>.", "<Spectators> people saw <Home> play <Guests>[, which ended <Score>|].")),
    ({"Station": "name", "Measured": "date", "Temperature": "measure", "Rain": "measure", "Wind": "adjective", "Region": "region"},
     ("On <Measured>, the station in <Station> (<Region>) measured <Temperature> and <Rain> of rain.", "The wind in <Station> was <Wind>.", "Weather for <Station>, <Measured>: wind <Wind>, rain <Rain>.")),
    ({"Product": "thing", "Maker": "firm", "Price": "price", "Stock": "number", "Colour": "adjective", "Code": "code"},
     ("<Maker> sells <Product> for <Price>.", "There are <Stock> left in stock[ (code <Code>)|].", "[The <Colour> one|<Product>] costs <Price> and is made by <Maker>.")),
    ({"Animal": "name", "Lives in": "region", "Eats": "nouns", "Length": "measure", "First seen": "date", "Seen by": "people"},
     ("The <Animal> lives in <Lives in> and eats <Eats>.", "On <First seen>, <Seen by> [saw|found|described] the first <Animal> in <Lives in>.", "A <Animal> grows to <Length>.")),
    ({"Machine": "code", "Site": "name", "Checked": "date", "Checked by": "people", "Fault": "fault", "Hours": "number"},
     ("On <Checked>, <Checked by> [checked|examined|stopped] machine <Machine> in <Site>: <Fault>.", "[No faults were reported.|The fault was repaired.|]", "<Machine> in <Site> ran for <Hours> hours before <Fault>.")),
    ({"Town": "name", "Province": "region", "Country": "name", "People": "number", "Known for": "nouns", "Founded": "number"},
     ("<Town> (<Province>, <Country>) is a town of <People> people, known for <Known for>.", "It was founded in <Founded>.", "<Town> lies in <Province>, in the [north|south|east|west] of <Country>.")),
    ({"Event": "thing", "Day": "date", "Held in": "name", "Held by": "firm", "Guests": "number", "Report": "firm"},
     ("On <Day>, <Held by> [held|opened|staged] a show of <Event> in the town of <Held in>.", "At least <Guests> people came.", "<Report> reported on <Day> from <Held in> that <Guests> people [came|were there].")),
)  # fmt: skip
ARTICLE = re.compile(r"\b([Aa]) (?=[aeio])")  # a apple -> an apple
PLURAL = re.compile(r"(s|x|ch|sh)s\b")  # boxs -> boxes


def invented(dice: Dice) -> str:
    """A capitalised word that may not exist, of two to four syllables."""
    syllables = [dice.pick(ONSETS) + dice.pick(VOWELS) for _ in range(2 + dice.below(3))]
    return ("".join(syllables) + dice.pick(CODAS)).capitalize()


def fill(dice: Dice, template: str) -> str:
    """The template with its choices made and `{n}` noun, `{a}` adjective, `{v}` verb, `{p}` person, `{d}` adverb filled in."""
    words = {"n": NOUNS, "a": ADJECTIVES, "v": VERBS, "p": PEOPLE, "d": ADVERBS}
    parts = dice.phrase(template).split("{")
    text = parts[0] + "".join(dice.pick(words[part[0]]) + part[2:] for part in parts[1:])
    return ARTICLE.sub(r"\1n ", PLURAL.sub(r"\1es", text))


def date(dice: Dice) -> str:
    """A day in one of four spellings, mostly `5 March 1987`."""
    day, month, year = 1 + dice.below(31), dice.below(12), 1900 + dice.below(200)
    style = dice.below(8)
    if style == 0:
        return f"{year}-{month + 1:02d}-{day:02d}"
    return (
        f"{MONTHS[month]} {day}, {year}"
        if style == 1
        else f"{day:02d} {MONTHS[month]} {year}"
        if style == 2
        else f"{day} {MONTHS[month]} {year}"
    )


def number(dice: Dice) -> str:
    """A whole number of one to four digits."""
    return str(dice.below((10, 20, 100, 1000, 10000)[dice.below(5)]))


VALUES: dict[str, Callable[[Dice], str]] = {
    "name": invented,
    "region": lambda dice: fill(dice, "[Northern|Southern|Western|Eastern|Upper|Lower|New|] ").lstrip() + invented(dice),
    "firm": lambda dice: invented(dice) + fill(dice, " [Works|Museum|Transport|Society|School|Stadium|Mills|& Co|Gazette|Radio|Group|Union|Club|Office of {a} Things|Front Street House]"),
    "date": date,
    "time": lambda dice: f"{dice.below(24):02d}:{dice.below(60):02d}",
    "number": number,
    "measure": lambda dice: f"{number(dice)} {dice.pick(UNITS)}",
    "price": lambda dice: f"${number(dice)}.{dice.below(100):02d}",
    "score": lambda dice: f"{dice.below(6)}-{dice.below(6)}",
    "code": lambda dice: invented(dice)[:3].upper() + str(dice.below(100000)),
    "adjective": lambda dice: dice.pick(ADJECTIVES),
    "thing": lambda dice: fill(dice, "a [{a} |]{n}[ of {n}|/{n}|]"),
    "nouns": lambda dice: fill(dice, "{n} and {n}"),
    "people": lambda dice: fill(dice, "[a {p}|two {p}s|a group of {p}s|the {p}s of ]").replace("of ", "of " + invented(dice)) if dice.below(2) else fill(dice, "{p}s"),
    "fault": lambda dice: fill(dice, "[the {n} was broken|the {n} turned {a}|{n} in the {n}|no fault]"),
}  # fmt: skip


def _rows(dice: Dice, record: dict[str, str]) -> str:
    """The record as text, in one of five layouts."""
    between, end = dice.pick(((": ", "\n"), (": ", "\n"), (" = ", "\n"), (": ", "; "), ("=", " | ")))
    lower = dice.below(3) == 0
    return end.join(f"{name.lower() if lower else name}{between}{value}" for name, value in record.items())


def _order(dice: Dice, items: list[str]) -> list[str]:
    return [item for _, item in sorted((dice.random(), item) for item in items)]


def described(dice: Dice) -> str:
    """A record of some domain, and sentences that repeat its fields."""
    fields, said = dice.pick(DOMAINS)
    names = _order(dice, list(fields)) if dice.below(2) else list(fields)
    record = {name: VALUES[fields[name]](dice) for name in names}
    text = dice.phrase(" ".join(_order(dice, list(said))[: 1 + dice.below(3)]))
    for name, value in record.items():
        text = text.replace(f"<{name}>", value)
    shown = {name: value for name, value in record.items() if dice.below(12)}
    title = dice.pick(("", "", "Summary: ", "Text: ", "In words: "))
    return f"{_rows(dice, shown)}\n{title}{text[:1].upper()}{text[1:]}"


def table(dice: Dice) -> str:
    """A record of arbitrary fields and values, and questions or sentences about them."""
    names = list(dict.fromkeys(dice.pick(TOPICS) for _ in range(3 + dice.below(6))))
    kinds = list(VALUES)
    record = {name.capitalize(): VALUES[dice.pick(kinds)](dice) for name in names}
    form = dice.pick(("The {} is {}.", "Q: {}? A: {}", "{} {}", "It has {} {}.", "the {} ({}),", "{}: {}"))
    asked = _order(dice, list(record))[: 1 + dice.below(len(record))]
    return f"{_rows(dice, record)}\n" + " ".join(form.format(name.lower(), record[name]) for name in asked)


def story(dice: Dice) -> str:
    """A few sentences about one person of a trade and a thing, which come back."""
    who, what, town = fill(dice, "[{a} |]{p}"), fill(dice, "[{a} |]{n}"), invented(dice)
    lines = [
        fill(dice, f"[On {date(dice)}, a|Once a|Last week, a|In {town}, a] {who} {{v}} a {what} {PLACE}[ {WHEN}|].")
    ]
    for _ in range(1 + dice.below(6)):
        other = dice.phrase("[The|A|Another|Some|Several|Members of the|A group of|{number}]").replace(
            "{number}", number(dice)
        )
        lines.append(
            fill(
                dice,
                dice.pick(
                    (
                        f"The {who} [{{d}} |]{{v}} the {what}[ and {{v}} it|]{'.' if dice.below(2) else f' {WHEN}.'}",
                        f"{other} [{{a}} |][{{p}}s|{{n}}s|people] [were {{v}}|{{v}} the {{n}}|came to {town}|left {town}|were seen {PLACE}] [{WHEN}|to ask for the {what}|with a {{n}}|without a {{n}}|because of the {{n}}].",
                        f"There [was a|were no] {{n}}[s|] {PLACE}[, and the {what} was {{a}}|].",
                        f"[It was|The {what} is|The {{n}} had been] {{a}}[ and {{a}}|, but {{a}}|] [in|near] {town}.",
                        f'"[Where is|Who {{v}}|I {{v}}|We want|Do not touch] the {what}[?|!]" [said|asked|called] the {who}.',
                    )
                ),
            )
        )
    return " ".join(lines)


def recipe(dice: Dice) -> str:
    """Ingredients with amounts, and steps that use them."""
    things = list(dict.fromkeys(dice.pick(NOUNS) for _ in range(3 + dice.below(4))))
    amounts = [f"{number(dice)} {dice.pick(UNITS)} {thing}" for thing in things]
    steps = [
        fill(dice, f"[Add|Wash|Cut|Boil|Mix in|Dry|Weigh|Cover] the {thing}[ {{d}}|][ for {number(dice)} minutes|]")
        for thing in things
    ]
    return fill(dice, "{a} {n} with {n}").capitalize() + "\n- " + "\n- ".join(amounts) + "\n" + ". ".join(steps) + "."


def sums(dice: Dice) -> str:
    """Lines of small sums, counting, or sorting."""
    kind = dice.below(4)
    if kind == 0:
        pairs = [(dice.below(100), dice.below(100)) for _ in range(3 + dice.below(6))]
        return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
    if kind == 1:
        start, pace = dice.below(1000), 1 + dice.below(10)
        return ", ".join(str(start + pace * i) for i in range(5 + dice.below(15)))
    words = [dice.pick(NOUNS) if kind == 2 else invented(dice) for _ in range(3 + dice.below(7))]
    return (
        f"[{', '.join(words)}]\n"
        + ("in order" if kind == 2 else "again")
        + f": {', '.join(sorted(words) if kind == 2 else words)}"
    )


def timetable(dice: Dice) -> str:
    """Lines of times, places and numbers."""
    places = [invented(dice) for _ in range(2 + dice.below(3))]
    lines = [
        f"{VALUES['time'](dice)} {dice.pick(places)} - {dice.pick(places)} ({number(dice)})"
        for _ in range(4 + dice.below(6))
    ]
    return f"From {places[0]} to {places[1]}, {date(dice)}\n" + "\n".join(lines)


def news(dice: Dice) -> str:
    """A short report on weather, trade or building work in one place."""
    town, region, day, price = invented(dice), VALUES["region"](dice), date(dice), VALUES["price"](dice)
    opening = f"[{town}, {day}: |On {day}, in {town} ({region}), |In the town of {town}, |Around {day}, near {town}, ]"
    text = dice.phrase(opening) + " ".join(fill(dice, dice.pick((
        f"[heavy rain|a storm|snow|fog|a flood|a fire|strong wind] [damaged|closed|covered|reached] [the {{n}}|several {{n}}s|{number(dice)} houses|the main road][ {WHEN}|].",
        f"[workers|{{p}}s|residents|students|members of the {region} {{n}} club] [opened|repaired|{{v}}] [a new|the {{a}}] {{n}} [for {price}|{PLACE}].",
        f"the price of {{n}}s [rose|fell] to {price}, [because of the {{n}}|according to the {{n}} office|the highest of the year].",
        f"[no injuries|no losses|{number(dice)} cases|a loss of {price}] [were|was] reported [in {town}|from {region}|by the {{p}}s].",
        f"the council of {town} [agreed on|signed|refused|asked for] a {{a}} {{n}} [and|or] {number(dice)} {{n}}s.",
    ))) for _ in range(1 + dice.below(4)))  # fmt: skip
    return re.sub(r"(^|\. )([a-z])", lambda found: found[1] + found[2].upper(), text)


KINDS: tuple[tuple[Callable[[Dice], str], float], ...] = (
    (described, 34), (table, 14), (story, 18), (news, 16), (recipe, 5), (sums, 5), (timetable, 4),
)  # fmt: skip


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed gives the same stream everywhere."""
    dice = Dice(seed)
    while True:
        yield dice.weighted(KINDS)(dice)
