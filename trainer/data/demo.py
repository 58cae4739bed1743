# ruff: noqa: SIM905 - tables of words and phrases read better unbroken
"""The embedded data set: synthetic events in the shape of an ACLED export, made from a seed.

Nothing here is real: countries, places, groups and sources are invented, and no person is named. The shares of
types, empty second actors and fatalities follow public figures of ACLED's Africa rows of 2018-2022, and the way the
notes are phrased follows its 2022 notes. Each note repeats date and place of its record, and often the fatalities,
so that a model which learns to read the record can be told from one which only learns the style.

Long: more than half of it is data, the phrases and shares from which the rows are made.

The same seed gives the same rows everywhere: of `random.Random` only `random()` is used, the one method whose
sequence Python promises to keep, and all arithmetic on it is exact.
"""

import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

DEMO_RECORDS = 400  #: events in the embedded data set
DEMO_SEED = 2022  #: its seed

STATE, REBELS, MILITIA, COMMUNAL, RIOTERS, PROTESTERS, CIVILIANS, EXTERNAL = range(1, 9)  # ACLED's inter codes; 0: none
MONTHS = "January February March April May June July August September October November December".split()
FIRST_YEAR, NUM_YEARS = 2018, 5  # event dates fall in 2018-2022, days 1-28

# event type: share, share without fatalities, share without a second actor, {sub-event type: weight}
EVENT_TYPES: dict[str, tuple[float, float, float, dict[str, int]]] = {
    "Protests": (
        0.305,
        0.99,
        0.80,
        {"Peaceful protest": 86, "Protest with intervention": 11, "Excessive force against protesters": 3},
    ),
    "Violence against civilians": (
        0.237,
        0.50,
        0.0,
        {"Attack": 77, "Abduction/forced disappearance": 19, "Sexual violence": 4},
    ),
    "Battles": (
        0.218,
        0.42,
        0.0,
        {"Armed clash": 92, "Non-state actor overtakes territory": 4, "Government regains territory": 4},
    ),
    "Riots": (0.109, 0.88, 0.30, {"Violent demonstration": 45, "Mob violence": 55}),
    "Explosions/Remote violence": (
        0.067,
        0.50,
        0.0,
        {
            "Remote explosive/landmine/IED": 42,
            "Shelling/artillery/missile attack": 26,
            "Air/drone strike": 25,
            "Grenade": 4,
            "Suicide bomb": 3,
        },
    ),
    "Strategic developments": (
        0.064,
        0.97,
        0.60,
        {
            "Looting/property destruction": 36,
            "Arrests": 18,
            "Disrupted weapons use": 14,
            "Change to group/activity": 16,
            "Non-violent transfer of territory": 6,
            "Agreement": 5,
            "Headquarters or base established": 3,
            "Other": 2,
        },
    ),
}

# (lowest, highest, weight) of fatalities where there are any: a heavy tail
FATALITY_RANGES = (
    (1, 1, 43),
    (2, 2, 16),
    (3, 3, 11),
    (4, 5, 10),
    (6, 10, 11),
    (11, 19, 6),
    (20, 40, 2.2),
    (41, 80, 0.6),
    (81, 170, 0.2),
)

LABELS = {
    "Looting/property destruction": "Property destruction",
    "Arrests": "Arrests",
    "Disrupted weapons use": "Weapons seizure",
    "Change to group/activity": "Movement of forces",
    "Non-violent transfer of territory": "Non-violent activity",
    "Agreement": "Agreement",
    "Headquarters or base established": "Base",
    "Other": "Other",
}

# [a|b|c] is a choice, {name} a field; {where} holds the location, {one} and {two} speak of the actors.
CAUSE = (
    "[over|against|to denounce|to protest against] [the rising cost of living|a shortage of fuel|power cuts|the lack "
    "of clean water|poor roads|a new tax on traders|the price of bread|insecurity in the area|the arrest of union "
    "members|delays to the election|the results of the local vote|the demolition of market stalls|the closure of the "
    "border|unpaid wages|working conditions at the mine|the eviction of families|a land dispute|the transfer of "
    "teachers|corruption in the council|the state of the hospital]"
)
DEMAND = (
    "[to demand|to call for|demanding|calling for] [higher wages|the payment of salary arrears|better protection|the "
    "release of detainees|a new water pump|the resignation of the mayor|fresh elections|the reopening of "
    "schools|compensation for lost crops|more teachers|the repair of the bridge|an end to the curfew]"
)
NOTE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "Peaceful protest": (
        "{one} [gathered|staged a protest|held a peaceful rally|demonstrated|marched] {where} ["
        + CAUSE
        + "|"
        + DEMAND
        + "]",
        "[dozens of|hundreds of|a group of|] {one} [held a sit-in|blocked the main road|assembled in front of the "
        "[town hall|prefecture|court|hospital]] {where} [" + CAUSE + "|" + DEMAND + "]",
    ),
    "Protest with intervention": (
        "{one} protested {where} " + CAUSE + ". {two} [fired tear gas|used batons|intervened] [to disperse the "
        "crowd|and made several arrests]",
        "{two} dispersed {one} who had [gathered|assembled] {where} " + DEMAND + ". [{number} people were "
        "arrested|Some demonstrators were detained]",
    ),
    "Excessive force against protesters": (
        "{two} [opened fire on|fired live rounds at] {one} who demonstrated {where} " + CAUSE,
    ),
    "Violent demonstration": (
        "{one} [burned tyres|threw stones|set up barricades|looted shops] {where} [" + CAUSE + "|" + DEMAND + "]. "
        "[{two} responded with tear gas|{two} were called to the scene]",
        "a demonstration {where} [" + CAUSE + "] turned violent as {one} [clashed with|threw stones at] {two}. "
        "[{number} people were wounded|Several vehicles were damaged]",
    ),
    "Mob violence": (
        "a [mob|crowd of residents|group of young men] [beat|attacked|stoned] [a suspected thief|a man accused of "
        "theft|two suspected robbers] {where}[| before police arrived]",
        "{one} [attacked|set fire to] [a police post|a toll gate|several houses|a market] {where} [after a road "
        "accident|over a land dispute|following a football match]",
    ),
    "Armed clash": (
        "{one} [clashed with|fought|exchanged fire with|engaged] {two} {where}[| for several hours| during a patrol| "
        "after an ambush]",
        "{one} [ambushed|attacked] [a convoy|a position|a patrol|a checkpoint|a camp] of {two} {where}. [{number} "
        "people were wounded|The attackers withdrew|Weapons were taken|Both sides claimed success]",
    ),
    "Non-state actor overtakes territory": (
        "{one} [took control of|seized|captured] the [town|village|outpost] after [fighting|a clash] with {two} "
        "{where}",
    ),
    "Government regains territory": (
        "{one} [retook|regained control of|recaptured] the [town|village|area] from {two} {where}[| after two days "
        "of fighting]",
    ),
    "Attack": (
        "{one} [attacked|raided|opened fire on] [a farm|a bus|farmers|herders|a market|traders] {where}[|, wounding "
        "{number} people| and stole cattle| and burned several houses]",
        "{one} [shot|beat|stabbed] [a farmer|a shopkeeper|a village chief|two traders|a driver] {where} [at night|on "
        "the way home|for unknown reasons|over a debt]",
    ),
    "Abduction/forced disappearance": (
        "{one} [abducted|kidnapped|took away] [{number} people|a trader|two farmers|a local official|several "
        "travellers] {where}[| and asked for a ransom|. Their whereabouts are unknown|. They were released after "
        "some days]",
    ),
    "Sexual violence": ("{one} assaulted [{number}|several] [women|villagers] {where}",),
    "Remote explosive/landmine/IED": (
        "[an IED|a landmine|a roadside bomb] [planted by|attributed to] {one} [exploded|went off|detonated] {where}, "
        "hitting [a vehicle|a motorcycle|a lorry|a cart] of {two}",
    ),
    "Shelling/artillery/missile attack": (
        "{one} [shelled|fired mortar rounds at|fired rockets at] [positions|a camp|a settlement] of {two} {where}[|. "
        "Several houses were damaged]",
    ),
    "Air/drone strike": (
        "{one} [carried out|conducted] [an airstrike|a drone strike|several airstrikes] against [positions|a base|a "
        "convoy] of {two} {where}",
    ),
    "Grenade": ("{one} threw a grenade at {two} {where}[|, wounding {number} people]",),
    "Suicide bomb": (
        "a suicide bomber of {one} [detonated a vest|drove a vehicle] at [a checkpoint|a gate] of {two} {where}",
    ),
    "Looting/property destruction": (
        "{one} [looted|burned|destroyed|ransacked] [shops|houses|a school|a clinic|a granary|several farms] {where}",
    ),
    "Arrests": (
        "{one} arrested [{number} people|several suspects|{number} members of an armed group] {where}[| during a "
        "search operation]",
    ),
    "Disrupted weapons use": (
        "{one} [seized|found|defused] [a cache of weapons|an IED|{number} rifles|a landmine] {where}",
    ),
    "Change to group/activity": (
        "{one} [moved towards|set up a checkpoint near|withdrew from|were seen around] the [village|main "
        "road|market] {where}",
    ),
    "Non-violent transfer of territory": (
        "{one} [entered|took over] the [village|outpost] without a fight {where}[| after other forces had left]",
    ),
    "Agreement": (
        "{one} and local leaders [signed|agreed on] [a ceasefire|a peace accord|a grazing agreement] {where}",
    ),
    "Headquarters or base established": ("{one} [opened|established] a [base|camp|headquarters] {where}",),
    "Other": ("{one} [handed out leaflets|imposed a curfew|closed a road] {where}",),
}
DEATH_TEMPLATES = (
    "[At least {n}|{n}] [people|persons] were [killed|reported killed].",
    "{n} fatalities.",
    "{n} [people|persons] [died|lost their lives].",
    "The [event|violence] left {n} dead.",
)
ONE_DEATH_TEMPLATES = (
    "[At least 1|1] person was [killed|reported killed].",
    "1 fatality.",
    "1 [person|victim] died.",
    "The [event|violence] left 1 dead.",
)
UNCOUNTED_DEATH_TEMPLATES = (
    "[Several|Some] people were killed.",
    "There were [deaths|fatalities] among those present.",
    "Fatalities were reported.",
)
NO_DEATH_TEMPLATES = (
    "No fatalities were reported.",
    "There were no [injuries or fatalities|casualties].",
    "No casualties.",
    "Casualties unknown.",
)
# said of some events between what happened and who died; {admin1}, {country} and {one} are the record's own
CONTEXT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "Protests": (
        "The [protest|rally|march] was [called|organised] by [a trade union|a student union|local associations|a "
        "farmers' cooperative|an opposition party].",
        "Similar [protests|rallies] took place [in other towns of {admin1}|across {country}|the same week].",
        "The [crowd|participants] [carried banners|handed a letter to the authorities|dispersed after {number} "
        "hours|sang and held placards].",
    ),
    "Riots": (
        "The [road to {admin1}|main market] was [closed|blocked] for {number} [hours|days].",
        "[The police arrested {number} people|Calm returned in the evening|The authorities imposed a curfew|{number} "
        "houses were damaged].",
    ),
    "Battles": (
        "[The fighting|The clash] [lasted {number} hours|came after weeks of tension in {admin1}|followed an attack "
        "the week before].",
        "[{number} vehicles were burned|Residents fled to {admin1}|Reinforcements were sent from {admin1}|{number} "
        "fighters were captured].",
    ),
    "Violence against civilians": (
        "[The motive is unknown|The perpetrators fled|The authorities opened an inquiry|The attackers came on "
        "{number} motorcycles].",
        "[Residents fled to {admin1}|Food and money were taken|{number} houses were burned|It was the second such "
        "case in {admin1} that month].",
    ),
    "Explosions/Remote violence": (
        "[{number} people were wounded|The vehicle was destroyed|The road to {admin1} was closed|{number} buildings "
        "were damaged].",
    ),
    "Strategic developments": (
        "[There was no resistance|Residents of {admin1} were informed|The operation lasted {number} days|The goods "
        "were worth a large sum].",
    ),
}
CROWD_SIZES = (("no report", 84), ("hundreds", 4), ("dozens", 4), ("around {round}", 5), ("at least {round}", 3))

COUNTRIES = "Tamoria Keledia Sauvana Ombaria Zerunia Norembe Dagoria Mirundo Paleshia Quillane Ithoria Vashenda".split()
REGIONS = ("Northern Meridia", "Western Meridia", "Eastern Meridia", "Southern Meridia")
STARTS = "Ab Bal Cher Dul Efr Fand Gam Hul Ibr Jol Kab Lom Mang Nid Ong Pem Rog Sab Tund Ulm Vor Wend Yal Zig".split()
MIDDLES = "a abe ada ali ame andi ara eke elo emba eri ibo ila indo iru oba ola ondo oru uba ula umbe uni uru".split()
ENDS = "bou ch dara foy gari ko kesh lla mont nga ndou po ri rsa sso ta tivo vane wé zzou".split()


class Rng:
    """Draws from a seed; the sequence is the same on every platform and version of Python."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random  #: next float in [0, 1)

    def randrange(self, n: int) -> int:
        """A whole number in [0, n)."""
        return int(self.random() * n)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, all alike."""
        return items[int(self.random() * len(items))]

    def weighted_choice(self, items: Sequence[tuple[T, float]]) -> T:
        """One of the (item, weight) pairs' items, by weight."""
        remaining = self.random() * sum(weight for _, weight in items)
        for item, weight in items:
            remaining -= weight
            if remaining < 0:
                return item
        return items[-1][0]

    def expand(self, template: str) -> str:
        """The template with every `[a|b]`, also nested ones, replaced by one of its choices."""
        while "[" in template:
            template = CHOICE.sub(lambda match: self.choice(match[1].split("|")), template)
        return template


CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Country:
    """One invented country: places as (location, admin1), the frequent ones first, and actors by inter code."""

    name: str
    region: str
    places: tuple[tuple[str, str], ...]
    actors: dict[int, tuple[tuple[str, str], ...]]  # inter code: (name in the columns, mention in a note)


def place_name(rng: Rng) -> str:
    """An invented place name of three or four syllables."""
    return rng.choice(STARTS) + rng.choice(MIDDLES) + rng.choice(ENDS)


def _actors(rng: Rng, country: str) -> dict[int, tuple[tuple[str, str], ...]]:
    groups = [f"{place_name(rng)} {kind}" for kind in ("Liberation Front", "Defence Movement", "People's Army")]
    peoples = [place_name(rng) for _ in range(3)]
    since = FIRST_YEAR - rng.randrange(20)
    return {
        STATE: (
            (f"Military Forces of {country} ({since}-)", "[soldiers|military forces|troops|the army]"),
            (f"Police Forces of {country} ({since}-)", "[police|police forces|police officers]"),
        ),
        REBELS: tuple((name, f"[fighters of the|the|suspected members of the] {name}") for name in groups),
        MILITIA: (
            (
                f"Unidentified Armed Group ({country})",
                "[unidentified armed men|gunmen|unknown assailants|an unidentified armed group]",
            ),
            (f"{peoples[0]} Youth Militia", f"[members of|men from] the {peoples[0]} Youth Militia"),
        ),
        COMMUNAL: tuple(
            (f"{name} Communal Militia ({country})", f"[a {name} militia|armed {name} men]") for name in peoples
        ),
        RIOTERS: ((f"Rioters ({country})", "[rioters|residents|young people|students|supporters of a local party]"),),
        PROTESTERS: (
            (
                f"Protesters ({country})",
                "[protesters|residents|teachers|nurses|students|farmers|traders|miners|taxi "
                "drivers|villagers|retired workers]",
            ),
        ),
        CIVILIANS: ((f"Civilians ({country})", "civilians"),),
        EXTERNAL: (
            (f"Peacekeeping Mission in {country}", "peacekeepers"),
            (f"Private Security Forces ({country})", "private guards"),
        ),
    }


def _country(rng: Rng, index: int) -> Country:
    admins = [place_name(rng) for _ in range(8)]
    places = tuple((place_name(rng), rng.choice(admins)) for _ in range(90))
    return Country(COUNTRIES[index], REGIONS[index % 4], places, _actors(rng, COUNTRIES[index]))


@functools.cache
def invented_world() -> tuple[tuple[Country, ...], tuple[str, ...]]:
    """The invented countries and news sources; the same for every seed of events."""
    rng = Rng(7)
    countries = tuple(_country(rng, index) for index in range(len(COUNTRIES)))
    papers = ("Herald", "Times", "Radio", "Courier", "Post", "Daily", "Observer", "News Agency", "Tribune")
    return countries, tuple(f"{place_name(rng)} {rng.choice(papers)}" for _ in range(200))


# who acts, and against whom, by event type: (inter code, weight)
ACTOR_WEIGHTS: dict[str, tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]] = {
    "Protests": (((PROTESTERS, 1),), ((STATE, 9), (EXTERNAL, 1))),
    "Riots": (((RIOTERS, 1),), ((STATE, 5), (CIVILIANS, 5))),
    "Battles": (((STATE, 5), (REBELS, 3), (MILITIA, 1), (COMMUNAL, 1)), ((REBELS, 5), (MILITIA, 3), (COMMUNAL, 2))),
    "Violence against civilians": (((MILITIA, 5), (REBELS, 2), (COMMUNAL, 2), (STATE, 1)), ((CIVILIANS, 1),)),
    "Explosions/Remote violence": (((REBELS, 4), (STATE, 4), (MILITIA, 2)), ((CIVILIANS, 4), (STATE, 3), (REBELS, 3))),
    "Strategic developments": (((STATE, 4), (REBELS, 3), (MILITIA, 3)), ((CIVILIANS, 1),)),
}


def _fatalities(rng: Rng, zero_share: float) -> int:
    if rng.random() < zero_share:
        return 0
    low, high = rng.weighted_choice([((low, high), weight) for low, high, weight in FATALITY_RANGES])
    return low + rng.randrange(high - low + 1)


def _ending(rng: Rng, fatalities: int) -> str:
    """A last sentence on fatalities, with the digit in 57 % of the notes that have any, or nothing."""
    if not fatalities:
        return " " + rng.expand(rng.choice(NO_DEATH_TEMPLATES)) if rng.random() < 0.3 else ""
    counted = ONE_DEATH_TEMPLATES if fatalities == 1 else DEATH_TEMPLATES
    templates = counted if rng.random() < 0.55 else UNCOUNTED_DEATH_TEMPLATES
    return " " + rng.expand(rng.choice(templates)).replace("{n}", str(fatalities))


def _size_suffix(rng: Rng, event_type: str) -> str:
    """The size tail: on nearly every demonstration and on a part of the rest, 59 % in all."""
    if rng.random() >= (0.98 if event_type in ("Protests", "Riots") else 0.315):
        return ""
    return f" [size={rng.weighted_choice(CROWD_SIZES).replace('{round}', str(50 * (1 + rng.randrange(20))))}]"


def _note(rng: Rng, event: dict[str, str | int], actor1_text: str, actor2_text: str, country_name: str) -> str:
    """The free text of one event; every field it speaks of is the row's own."""
    sub_event_type = str(event["sub_event_type"])
    fields = {"one": rng.expand(actor1_text), "two": rng.expand(actor2_text), "number": str(2 + rng.randrange(14))}
    fields["where"] = rng.expand(
        "[in|in|in|near|in the town of|in the village of] {location}[| ({admin1})| ({admin1}, {near})]"
    ).format(near=country_name, **event)
    has_label = sub_event_type in LABELS and rng.random() < 0.86
    opening = f"{LABELS[sub_event_type]}: On" if has_label else "Around" if rng.random() < 0.053 else "On"
    text = " ".join(rng.expand(rng.choice(NOTE_TEMPLATES[sub_event_type])).format(**fields).split())
    text = re.sub(r"\. ([a-z])", lambda match: f". {match[1].upper()}", text).rstrip(".") + "."
    if rng.random() < 0.55:
        context = rng.expand(rng.choice(CONTEXT_TEMPLATES[str(event["event_type"])]))
        text += " " + context.format(number=2 + rng.randrange(14), admin1=event["admin1"], country=country_name)
    text += _ending(rng, int(event["fatalities"])) + _size_suffix(rng, str(event["event_type"]))
    return f"{opening} {event['event_date']}, {text}"


def _event(rng: Rng, index: int) -> dict[str, str | int]:
    countries, sources = invented_world()
    country = countries[int(rng.random() * rng.random() * len(countries))]  # the product favours the first ones
    location, admin1 = country.places[int(rng.random() * rng.random() * len(country.places))]
    event_type = rng.weighted_choice([(name, share[0]) for name, share in EVENT_TYPES.items()])
    _, zero_share, lone_share, sub_event_types = EVENT_TYPES[event_type]
    sub_event_type = rng.weighted_choice(tuple(sub_event_types.items()))
    # an intervention needs someone who intervenes; the other protests make up for the share of lone actors
    has_second_actor = sub_event_type.startswith(("Protest with", "Excessive")) or rng.random() >= (
        0.93 if event_type == "Protests" else lone_share
    )
    first_code, second_code = (rng.weighted_choice(code_weights) for code_weights in ACTOR_WEIGHTS[event_type])
    actor1, actor1_text = rng.choice(country.actors[first_code])
    candidates = [actor for actor in country.actors[second_code] if actor[0] != actor1]
    actor2, actor2_text = rng.choice(candidates) if has_second_actor else ("", "[police|soldiers]")
    day, month, year = 1 + rng.randrange(28), rng.choice(MONTHS), FIRST_YEAR + rng.randrange(NUM_YEARS)
    event: dict[str, str | int] = {
        "event_id_cnty": f"{country.name[:3].upper()}{index + 1}",
        "event_date": f"{day} {month} {year}",
        "year": year,
        "event_type": event_type,
        "sub_event_type": sub_event_type,
        "actor1": actor1,
        "inter1": first_code,
        "actor2": actor2,
        "inter2": second_code if has_second_actor else 0,
        "region": country.region,
        "country": country.name,
        "admin1": admin1,
        "location": location,
        "source": "; ".join(dict.fromkeys(rng.choice(sources) for _ in range(1 + (rng.random() < 0.25)))),
        "notes": "",
        "fatalities": _fatalities(
            rng, 0.0 if sub_event_type == "Excessive force against protesters" and rng.random() < 0.4 else zero_share
        ),
    }
    event["notes"] = _note(rng, event, actor1_text, actor2_text, country.name)
    return event


def events(n: int, seed: int = DEMO_SEED) -> Iterator[dict[str, str | int]]:
    """The first `n` events of a seed, as rows of an export of 2022-23."""
    rng = Rng(seed)
    for index in range(n):
        yield _event(rng, index)
