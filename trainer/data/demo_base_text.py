# ruff: noqa: SIM905 - tables of words and phrases read better unbroken
"""The text on which the embedded base model is pretrained: many kinds of made-up English, from a seed.

It is meant to teach what fine-tuning takes for granted (spelling, grammar, numbers and dates, and above all to copy
the fields of a record into a sentence) without the subject, the field names or the names of the demo data. Nothing is
copied from anywhere and no person is named. A document is one string without the end-of-text token.

Long: most of it is the words and sentences themselves.
"""

import itertools
import re
from collections.abc import Callable, Iterator

from trainer.data.demo import MONTHS, Rng

RETAINED_SEED, NUM_RETAINED = 7_000_000, 240  # about 17,000 tokens of demo-base

NOUNS = """apple arch ash attic axe badge bag bakery ball banner barn barrel basin basket bay bean bed bell bench
bicycle blanket boat bolt bone book boot bottle bowl box branch bread brick bridge broom brush bucket building bulb bush
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
ADJECTIVES = """amber ancient armed big black blue bold brass brave bright broad broken brown busy calm careful cheap
clean clear clever cold common cool curved damp dark deep dry dusty early eastern empty even fair famous fast flat
fresh frozen full gentle giant golden grand green grey happy hard heavy hidden hollow honest hot huge idle iron large
late lazy light local lonely long loud low lucky main mild military modern narrow neat new noisy northern old open
orange pale patient peaceful plain polite poor pretty proud public purple quick quiet rapid rare red rich ripe rough
round rusty sad safe salty sharp shiny short silent silver simple slow small smooth soft solid southern spare square
steady steep sticky still strange strong sunny sweet tall tame thick thin tiny tired unidentified unknown useful violent
warm weak western wet white wide wild wise wooden yellow young""".split()
VERBS = """admired arranged attacked avoided borrowed bought broke brought built buried called captured carried carved
caught chased checked cleaned closed collected copied counted covered crossed cut delivered described destroyed
discovered divided dragged drew dropped emptied entered established examined exchanged filled finished fixed followed
forgot found gathered guarded held hid invited joined kept left lifted lit loaded locked looked lost made marked
measured mended missed moved named noticed opened ordered packed painted passed picked placed planted polished pressed
protected provided pulled pushed raised reached released removed repaired replaced reported returned rolled sent set
shared showed shut sold sorted spilled stacked started stole stopped stored supported threw tied took touched traded
turned used visited washed watched weighed wrapped""".split()
PEOPLE = """baker builder captain carpenter cook driver engineer farmer fisher gardener guard guide judge librarian
mechanic miller miner nurse officer painter pilot plumber porter potter printer sailor scientist shepherd shopkeeper
smith soldier student tailor teacher trader traveller villager visitor watchman weaver writer""".split()
ADVERBS = (
    "again almost alone always carefully early gently late never often once quickly quietly slowly soon suddenly twice"
).split()
WHEN = (
    "[in the morning|in the evening|at night|at noon|after lunch|before dawn|after the rain|during the storm|for "
    "several hours|all day|every week|on the way home]"
)
PLACE = "[in|near|behind|beside|in front of|outside|at] the [{a} |]{n}"
UNITS = "mm cm m km g kg t ml l s min h days pieces boxes litres metres pounds degrees percent".split()
TOPICS = """colour material shape owner status category model size weight price code shelf label origin grade batch
speed height depth route platform gate zone climate diet habitat language currency crop signal channel voltage capacity
pressure season keeper rank score title""".split()
ONSETS = "b bl br c ch d dr f fl g gl gr h j k kr l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
VOWELS = "a a a e e e i i o o u ai au ea ee ie oa oo ou".split()
CODAS = ["", "", "", *"b ck d ff g l ll m mp n nd ng nt p r rk rn s sh ss st t th x".split()]

# Records: {field: kind of value}, then what is said of them. <field> is replaced by the value above it.
DOMAINS: tuple[tuple[dict[str, str], tuple[str, ...]], ...] = (
    (
        {
            "Parcel": "code",
            "Sent": "date",
            "From": "name",
            "To": "name",
            "Weight": "measure",
            "Content": "thing",
            "Carrier": "firm",
        },
        (
            "[On <Sent>, |]<Carrier> [took|shipped|sent] parcel <Parcel> [of <Weight> |]from <From> to <To>.",
            "The parcel holds <Content>.",
            "Parcel <Parcel> [left|was sent from] <From> on <Sent>[ and weighs <Weight>|].",
        ),
    ),
    (
        {
            "Object": "thing",
            "Acquired": "date",
            "Found": "name",
            "Museum": "firm",
            "Age": "number",
            "Condition": "adjective",
        },
        (
            "On <Acquired>, <Museum> [acquired|bought|was given] <Object> found [in|near] <Found>.",
            "<Object> from <Found> is <Age> years old and in <Condition> condition.",
            "Around <Acquired>, <Object> came to <Museum>.",
        ),
    ),
    (
        {"Train": "code", "Departs": "time", "Arrives": "time", "From": "name", "To": "name", "Platform": "number"},
        (
            "Train <Train> leaves <From> at <Departs> from platform <Platform> and [reaches|arrives in] <To> at <Arrives>.",  # noqa: E501
            "The train to <To> is <Train>.",
        ),
    ),
    (
        {
            "Match day": "date",
            "Home": "name",
            "Guests": "name",
            "Score": "score",
            "Ground": "firm",
            "Spectators": "number",
        },
        (
            "On <Match day>, <Home> [met|played|hosted] <Guests> at <Ground>.",
            "The score was <Score>.",
            "<Spectators> people saw <Home> play <Guests>[, which ended <Score>|].",
        ),
    ),
    (
        {
            "Station": "name",
            "Measured": "date",
            "Temperature": "measure",
            "Rain": "measure",
            "Wind": "adjective",
            "Region": "region",
        },
        (
            "On <Measured>, the station in <Station> (<Region>) measured <Temperature> and <Rain> of rain.",
            "The wind in <Station> was <Wind>.",
            "Weather for <Station>, <Measured>: wind <Wind>, rain <Rain>.",
        ),
    ),
    (
        {
            "Product": "thing",
            "Maker": "firm",
            "Price": "price",
            "Stock": "number",
            "Colour": "adjective",
            "Code": "code",
        },
        (
            "<Maker> sells <Product> for <Price>.",
            "There are <Stock> left in stock[ (code <Code>)|].",
            "[The <Colour> one|<Product>] costs <Price> and is made by <Maker>.",
        ),
    ),
    (
        {
            "Animal": "name",
            "Lives in": "region",
            "Eats": "nouns",
            "Length": "measure",
            "First seen": "date",
            "Seen by": "people",
        },
        (
            "The <Animal> lives in <Lives in> and eats <Eats>.",
            "On <First seen>, <Seen by> [saw|found|described] the first <Animal> in <Lives in>.",
            "A <Animal> grows to <Length>.",
        ),
    ),
    (
        {
            "Machine": "code",
            "Site": "name",
            "Checked": "date",
            "Checked by": "people",
            "Fault": "fault",
            "Hours": "number",
        },
        (
            "On <Checked>, <Checked by> [checked|examined|stopped] machine <Machine> in <Site>: <Fault>.",
            "[No faults were reported.|The fault was repaired.|]",
            "<Machine> in <Site> ran for <Hours> hours before <Fault>.",
        ),
    ),
    (
        {
            "Town": "name",
            "Province": "region",
            "Country": "name",
            "People": "number",
            "Known for": "nouns",
            "Founded": "number",
        },
        (
            "<Town> (<Province>, <Country>) is a town of <People> people, known for <Known for>.",
            "It was founded in <Founded>.",
            "<Town> lies in <Province>, in the [north|south|east|west] of <Country>.",
        ),
    ),
    (
        {"Event": "thing", "Day": "date", "Held in": "name", "Held by": "firm", "Guests": "number", "Report": "firm"},
        (
            "On <Day>, <Held by> [held|opened|staged] a show of <Event> in the town of <Held in>.",
            "At least <Guests> people came.",
            "<Report> reported on <Day> from <Held in> that <Guests> people [came|were there].",
        ),
    ),
)
ARTICLE = re.compile(r"\b([Aa]) (?=[aeio])")  # a apple -> an apple
PLURAL = re.compile(r"(s|x|ch|sh)s\b")  # boxs -> boxes


def invent_name(rng: Rng) -> str:
    """A capitalised word that may not exist, of two to four syllables."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(2 + rng.randrange(3))]
    return ("".join(syllables) + rng.choice(CODAS)).capitalize()


def fill_template(rng: Rng, template: str) -> str:
    """The template with its choices made and a word of its kind for each `{n}`, `{a}`, `{v}`, `{p}` and `{d}`."""
    word_lists = {"n": NOUNS, "a": ADJECTIVES, "v": VERBS, "p": PEOPLE, "d": ADVERBS}
    parts = rng.expand(template).split("{")
    text = parts[0] + "".join(rng.choice(word_lists[part[0]]) + part[2:] for part in parts[1:])
    return ARTICLE.sub(r"\1n ", PLURAL.sub(r"\1es", text))


def make_date(rng: Rng) -> str:
    """A day in one of four spellings, mostly `5 March 1987`."""
    day, month, year = 1 + rng.randrange(31), rng.randrange(12), 1900 + rng.randrange(200)
    style = rng.randrange(8)
    if style == 0:
        return f"{year}-{month + 1:02d}-{day:02d}"
    if style == 1:
        return f"{MONTHS[month]} {day}, {year}"
    return f"{day:02d} {MONTHS[month]} {year}" if style == 2 else f"{day} {MONTHS[month]} {year}"


def make_number(rng: Rng) -> str:
    """A whole number of one to four digits."""
    return str(rng.randrange((10, 20, 100, 1000, 10000)[rng.randrange(5)]))


VALUE_GENERATORS: dict[str, Callable[[Rng], str]] = {
    "name": invent_name,
    "region": lambda rng: (
        rng.expand("[Northern|Southern|Western|Eastern|Upper|Lower|New|] ").lstrip() + invent_name(rng)
    ),
    "firm": lambda rng: (
        invent_name(rng)
        + fill_template(
            rng,
            " [Works|Museum|Transport|Society|School|Stadium|Mills|& Co|Gazette|Radio|Group|Union|Club|Office of {a} "
            "Things|Front Street House]",
        )
    ),
    "date": make_date,
    "time": lambda rng: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}",
    "number": make_number,
    "measure": lambda rng: f"{make_number(rng)} {rng.choice(UNITS)}",
    "price": lambda rng: f"${make_number(rng)}.{rng.randrange(100):02d}",
    "score": lambda rng: f"{rng.randrange(6)}-{rng.randrange(6)}",
    "code": lambda rng: invent_name(rng)[:3].upper() + str(rng.randrange(100000)),
    "adjective": lambda rng: rng.choice(ADJECTIVES),
    "thing": lambda rng: fill_template(rng, "a [{a} |]{n}[ of {n}|/{n}|]"),
    "nouns": lambda rng: fill_template(rng, "{n} and {n}"),
    "people": lambda rng: (
        fill_template(rng, "[a {p}|two {p}s|a group of {p}s|the {p}s of ]").replace("of ", "of " + invent_name(rng))
        if rng.randrange(2)
        else fill_template(rng, "{p}s")
    ),
    "fault": lambda rng: fill_template(rng, "[the {n} was broken|the {n} turned {a}|{n} in the {n}|no fault]"),
}


def _format_record(rng: Rng, record: dict[str, str]) -> str:
    """The record as text, in one of five layouts."""
    separator, line_end = rng.choice(((": ", "\n"), (": ", "\n"), (" = ", "\n"), (": ", "; "), ("=", " | ")))
    is_lower = rng.randrange(3) == 0
    return line_end.join(f"{name.lower() if is_lower else name}{separator}{value}" for name, value in record.items())


def _shuffled(rng: Rng, items: list[str]) -> list[str]:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def make_described_record(rng: Rng) -> str:
    """A record of some domain, and sentences that repeat its fields."""
    fields, templates = rng.choice(DOMAINS)
    names = _shuffled(rng, list(fields)) if rng.randrange(2) else list(fields)
    record = {name: VALUE_GENERATORS[fields[name]](rng) for name in names}
    text = rng.expand(" ".join(_shuffled(rng, list(templates))[: 1 + rng.randrange(3)]))
    for name, value in record.items():
        text = text.replace(f"<{name}>", value)
    shown_fields = {name: value for name, value in record.items() if rng.randrange(12)}
    title = rng.choice(("", "", "Summary: ", "Text: ", "In words: "))
    return f"{_format_record(rng, shown_fields)}\n{title}{text[:1].upper()}{text[1:]}"


def make_table(rng: Rng) -> str:
    """A record of arbitrary fields and values, and questions or sentences about them."""
    names = list(dict.fromkeys(rng.choice(TOPICS) for _ in range(3 + rng.randrange(6))))
    value_kinds = list(VALUE_GENERATORS)
    record = {name.capitalize(): VALUE_GENERATORS[rng.choice(value_kinds)](rng) for name in names}
    template = rng.choice(("The {} is {}.", "Q: {}? A: {}", "{} {}", "It has {} {}.", "the {} ({}),", "{}: {}"))
    queried_names = _shuffled(rng, list(record))[: 1 + rng.randrange(len(record))]
    return f"{_format_record(rng, record)}\n" + " ".join(
        template.format(name.lower(), record[name]) for name in queried_names
    )


def make_story(rng: Rng) -> str:
    """A few sentences about one person of a trade and a thing, which come back."""
    person, thing, town = fill_template(rng, "[{a} |]{p}"), fill_template(rng, "[{a} |]{n}"), invent_name(rng)
    opening = f"[On {make_date(rng)}, a|Once a|Last week, a|In {town}, a] {person} {{v}} a {thing} {PLACE}[ {WHEN}|]."
    lines = [fill_template(rng, opening)]
    for _ in range(1 + rng.randrange(6)):
        subject = rng.expand("[The|A|Another|Some|Several|Members of the|A group of|{number}]").replace(
            "{number}", make_number(rng)
        )
        lines.append(
            fill_template(
                rng,
                rng.choice(
                    (
                        f"The {person} [{{d}} |]{{v}} the {thing}[ and {{v}} it|]{'.' if rng.randrange(2) else f' {WHEN}.'}",  # noqa: E501
                        f"{subject} [{{a}} |][{{p}}s|{{n}}s|people] [were {{v}}|{{v}} the {{n}}|came to {town}|left {town}|were "  # noqa: E501
                        f"seen {PLACE}] [{WHEN}|to ask for the {thing}|with a {{n}}|without a {{n}}|because of the {{n}}].",  # noqa: E501
                        f"There [was a|were no] {{n}}[s|] {PLACE}[, and the {thing} was {{a}}|].",
                        f"[It was|The {thing} is|The {{n}} had been] {{a}}[ and {{a}}|, but {{a}}|] [in|near] {town}.",
                        f'"[Where is|Who {{v}}|I {{v}}|We want|Do not touch] the {thing}[?|!]" [said|asked|called] the {person}.',  # noqa: E501
                    )
                ),
            )
        )
    return " ".join(lines)


def make_recipe(rng: Rng) -> str:
    """Ingredients with amounts, and steps that use them."""
    things = list(dict.fromkeys(rng.choice(NOUNS) for _ in range(3 + rng.randrange(4))))
    amounts = [f"{make_number(rng)} {rng.choice(UNITS)} {thing}" for thing in things]
    step = "[Add|Wash|Cut|Boil|Mix in|Dry|Weigh|Cover] the %s[ {d}|][ for %s minutes|]"
    steps = [fill_template(rng, step % (thing, make_number(rng))) for thing in things]
    title = fill_template(rng, "{a} {n} with {n}").capitalize()
    return "\n- ".join([title, *amounts]) + "\n" + ". ".join(steps) + "."


def make_sums(rng: Rng) -> str:
    """Lines of small sums, counting, or sorting."""
    task = rng.randrange(4)
    if task == 0:
        pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(3 + rng.randrange(6))]
        return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
    if task == 1:
        start, increment = rng.randrange(1000), 1 + rng.randrange(10)
        return ", ".join(str(start + increment * i) for i in range(5 + rng.randrange(15)))
    words = [rng.choice(NOUNS) if task == 2 else invent_name(rng) for _ in range(3 + rng.randrange(7))]
    order, answer = ("in order", sorted(words)) if task == 2 else ("again", words)
    return f"[{', '.join(words)}]\n{order}: {', '.join(answer)}"


def make_timetable(rng: Rng) -> str:
    """Lines of times, places and numbers."""
    places = [invent_name(rng) for _ in range(2 + rng.randrange(3))]
    lines = [
        f"{VALUE_GENERATORS['time'](rng)} {rng.choice(places)} - {rng.choice(places)} ({make_number(rng)})"
        for _ in range(4 + rng.randrange(6))
    ]
    return f"From {places[0]} to {places[1]}, {make_date(rng)}\n" + "\n".join(lines)


def make_news(rng: Rng) -> str:
    """A short report on weather, trade or building work in one place."""
    town, region, day = invent_name(rng), VALUE_GENERATORS["region"](rng), make_date(rng)
    price = VALUE_GENERATORS["price"](rng)
    opening = f"[{town}, {day}: |On {day}, in {town} ({region}), |In the town of {town}, |Around {day}, near {town}, ]"
    text = rng.expand(opening) + " ".join(
        fill_template(
            rng,
            rng.choice(
                (
                    f"[heavy rain|a storm|snow|fog|a flood|a fire|strong wind] [damaged|closed|covered|reached] [the "
                    f"{{n}}|several {{n}}s|{make_number(rng)} houses|the main road][ {WHEN}|].",
                    f"[workers|{{p}}s|residents|students|members of the {region} {{n}} club] [opened|repaired|{{v}}] [a new|the "  # noqa: E501
                    f"{{a}}] {{n}} [for {price}|{PLACE}].",
                    f"the price of {{n}}s [rose|fell] to {price}, [because of the {{n}}|according to the {{n}} office|the highest "  # noqa: E501
                    "of the year].",
                    f"[no injuries|no losses|{make_number(rng)} cases|a loss of {price}] [were|was] reported [in {town}|from "  # noqa: E501
                    f"{region}|by the {{p}}s].",
                    f"the council of {town} [agreed on|signed|refused|asked for] a {{a}} {{n}} [and|or] {make_number(rng)} {{n}}s.",  # noqa: E501
                )
            ),
        )
        for _ in range(1 + rng.randrange(4))
    )
    return re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), text)


DOCUMENT_TYPES: tuple[tuple[Callable[[Rng], str], float], ...] = (
    (make_described_record, 34),
    (make_table, 14),
    (make_story, 18),
    (make_news, 16),
    (make_recipe, 5),
    (make_sums, 5),
    (make_timetable, 4),
)


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed gives the same stream everywhere."""
    rng = Rng(seed)
    while True:
        yield rng.weighted_choice(DOCUMENT_TYPES)(rng)


def retained_records() -> Iterator[dict[str, str]]:
    """Documents that the base never saw: its pretraining drew from other seeds. Their loss says what it forgets."""
    return ({"text": document} for document in itertools.islice(documents(RETAINED_SEED), NUM_RETAINED))
