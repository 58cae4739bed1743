# ruff: noqa: E501, SIM905 - tables of words and phrases read better unbroken
"""The embedded data set: synthetic events in the shape of an ACLED export, made from a seed.

Nothing here is real: countries, places, groups and sources are invented, and no person is named. The shares of
types, empty second actors and fatalities follow public figures of ACLED's Africa rows of 2018-2022, and the way the
notes are phrased follows its 2022 notes. Each note repeats date and place of its record, and often the fatalities,
so that a model which learns to read the record can be told from one which only learns the style.

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
FIRST_YEAR, YEARS = 2018, 5  # event dates fall in 2018-2022, days 1-28

# event type: share, share without fatalities, share without a second actor, {sub-event type: weight}
TYPES: dict[str, tuple[float, float, float, dict[str, int]]] = {
    "Protests": (0.305, 0.99, 0.80, {"Peaceful protest": 86, "Protest with intervention": 11, "Excessive force against protesters": 3}),
    "Violence against civilians": (0.237, 0.50, 0.0, {"Attack": 77, "Abduction/forced disappearance": 19, "Sexual violence": 4}),
    "Battles": (0.218, 0.42, 0.0, {"Armed clash": 92, "Non-state actor overtakes territory": 4, "Government regains territory": 4}),
    "Riots": (0.109, 0.88, 0.30, {"Violent demonstration": 45, "Mob violence": 55}),
    "Explosions/Remote violence": (
        0.067, 0.50, 0.0,
        {"Remote explosive/landmine/IED": 42, "Shelling/artillery/missile attack": 26, "Air/drone strike": 25, "Grenade": 4, "Suicide bomb": 3},
    ),
    "Strategic developments": (
        0.064, 0.97, 0.60,
        {"Looting/property destruction": 36, "Arrests": 18, "Disrupted weapons use": 14, "Change to group/activity": 16,
         "Non-violent transfer of territory": 6, "Agreement": 5, "Headquarters or base established": 3, "Other": 2},
    ),
}  # fmt: skip

# (lowest, highest, weight) of fatalities where there are any: a heavy tail
FATALITIES = (
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
    "[over|against|to denounce|to protest against] [the rising cost of living|a shortage of fuel|power cuts|the lack of clean water|poor roads|"
    "a new tax on traders|the price of bread|insecurity in the area|the arrest of union members|delays to the election|"
    "the results of the local vote|the demolition of market stalls|the closure of the border|unpaid wages|working conditions at the mine|"
    "the eviction of families|a land dispute|the transfer of teachers|corruption in the council|the state of the hospital]"
)
DEMAND = (
    "[to demand|to call for|demanding|calling for] [higher wages|the payment of salary arrears|better protection|the release of detainees|"
    "a new water pump|the resignation of the mayor|fresh elections|the reopening of schools|compensation for lost crops|more teachers|"
    "the repair of the bridge|an end to the curfew]"
)
NOTES: dict[str, tuple[str, ...]] = {
    "Peaceful protest": (
        "{one} [gathered|staged a protest|held a peaceful rally|demonstrated|marched] {where} [" + CAUSE + "|" + DEMAND + "]",
        "[dozens of|hundreds of|a group of|] {one} [held a sit-in|blocked the main road|assembled in front of the [town hall|prefecture|court|hospital]] {where} [" + CAUSE + "|" + DEMAND + "]",
    ),
    "Protest with intervention": (
        "{one} protested {where} " + CAUSE + ". {two} [fired tear gas|used batons|intervened] [to disperse the crowd|and made several arrests]",
        "{two} dispersed {one} who had [gathered|assembled] {where} " + DEMAND + ". [{number} people were arrested|Some demonstrators were detained]",
    ),
    "Excessive force against protesters": (
        "{two} [opened fire on|fired live rounds at] {one} who demonstrated {where} " + CAUSE,
    ),
    "Violent demonstration": (
        "{one} [burned tyres|threw stones|set up barricades|looted shops] {where} [" + CAUSE + "|" + DEMAND + "]. [{two} responded with tear gas|{two} were called to the scene]",
        "a demonstration {where} [" + CAUSE + "] turned violent as {one} [clashed with|threw stones at] {two}. [{number} people were wounded|Several vehicles were damaged]",
    ),
    "Mob violence": (
        "a [mob|crowd of residents|group of young men] [beat|attacked|stoned] [a suspected thief|a man accused of theft|two suspected robbers] {where}[| before police arrived]",
        "{one} [attacked|set fire to] [a police post|a toll gate|several houses|a market] {where} [after a road accident|over a land dispute|following a football match]",
    ),
    "Armed clash": (
        "{one} [clashed with|fought|exchanged fire with|engaged] {two} {where}[| for several hours| during a patrol| after an ambush]",
        "{one} [ambushed|attacked] [a convoy|a position|a patrol|a checkpoint|a camp] of {two} {where}. [{number} people were wounded|The attackers withdrew|Weapons were taken|Both sides claimed success]",
    ),
    "Non-state actor overtakes territory": (
        "{one} [took control of|seized|captured] the [town|village|outpost] after [fighting|a clash] with {two} {where}",
    ),
    "Government regains territory": (
        "{one} [retook|regained control of|recaptured] the [town|village|area] from {two} {where}[| after two days of fighting]",
    ),
    "Attack": (
        "{one} [attacked|raided|opened fire on] [a farm|a bus|farmers|herders|a market|traders] {where}[|, wounding {number} people| and stole cattle| and burned several houses]",
        "{one} [shot|beat|stabbed] [a farmer|a shopkeeper|a village chief|two traders|a driver] {where} [at night|on the way home|for unknown reasons|over a debt]",
    ),
    "Abduction/forced disappearance": (
        "{one} [abducted|kidnapped|took away] [{number} people|a trader|two farmers|a local official|several travellers] {where}[| and asked for a ransom|. Their whereabouts are unknown|. They were released after some days]",
    ),
    "Sexual violence": ("{one} assaulted [{number}|several] [women|villagers] {where}",),
    "Remote explosive/landmine/IED": (
        "[an IED|a landmine|a roadside bomb] [planted by|attributed to] {one} [exploded|went off|detonated] {where}, hitting [a vehicle|a motorcycle|a lorry|a cart] of {two}",
    ),
    "Shelling/artillery/missile attack": (
        "{one} [shelled|fired mortar rounds at|fired rockets at] [positions|a camp|a settlement] of {two} {where}[|. Several houses were damaged]",
    ),
    "Air/drone strike": (
        "{one} [carried out|conducted] [an airstrike|a drone strike|several airstrikes] against [positions|a base|a convoy] of {two} {where}",
    ),
    "Grenade": ("{one} threw a grenade at {two} {where}[|, wounding {number} people]",),
    "Suicide bomb": ("a suicide bomber of {one} [detonated a vest|drove a vehicle] at [a checkpoint|a gate] of {two} {where}",),
    "Looting/property destruction": ("{one} [looted|burned|destroyed|ransacked] [shops|houses|a school|a clinic|a granary|several farms] {where}",),
    "Arrests": ("{one} arrested [{number} people|several suspects|{number} members of an armed group] {where}[| during a search operation]",),
    "Disrupted weapons use": ("{one} [seized|found|defused] [a cache of weapons|an IED|{number} rifles|a landmine] {where}",),
    "Change to group/activity": ("{one} [moved towards|set up a checkpoint near|withdrew from|were seen around] the [village|main road|market] {where}",),
    "Non-violent transfer of territory": ("{one} [entered|took over] the [village|outpost] without a fight {where}[| after other forces had left]",),
    "Agreement": ("{one} and local leaders [signed|agreed on] [a ceasefire|a peace accord|a grazing agreement] {where}",),
    "Headquarters or base established": ("{one} [opened|established] a [base|camp|headquarters] {where}",),
    "Other": ("{one} [handed out leaflets|imposed a curfew|closed a road] {where}",),
}  # fmt: skip
DEAD = (
    "[At least {n}|{n}] [people|persons] were [killed|reported killed].",
    "{n} fatalities.",
    "{n} [people|persons] [died|lost their lives].",
    "The [event|violence] left {n} dead.",
)
ONE_DEAD = (
    "[At least 1|1] person was [killed|reported killed].",
    "1 fatality.",
    "1 [person|victim] died.",
    "The [event|violence] left 1 dead.",
)
UNCOUNTED = (
    "[Several|Some] people were killed.",
    "There were [deaths|fatalities] among those present.",
    "Fatalities were reported.",
)
UNHURT = (
    "No fatalities were reported.",
    "There were no [injuries or fatalities|casualties].",
    "No casualties.",
    "Casualties unknown.",
)
# said of some events between what happened and who died; {admin1}, {country} and {one} are the record's own
CONTEXT: dict[str, tuple[str, ...]] = {
    "Protests": (
        "The [protest|rally|march] was [called|organised] by [a trade union|a student union|local associations|a farmers' cooperative|an opposition party].",
        "Similar [protests|rallies] took place [in other towns of {admin1}|across {country}|the same week].",
        "The [crowd|participants] [carried banners|handed a letter to the authorities|dispersed after {number} hours|sang and held placards].",
    ),
    "Riots": (
        "The [road to {admin1}|main market] was [closed|blocked] for {number} [hours|days].",
        "[The police arrested {number} people|Calm returned in the evening|The authorities imposed a curfew|{number} houses were damaged].",
    ),
    "Battles": (
        "[The fighting|The clash] [lasted {number} hours|came after weeks of tension in {admin1}|followed an attack the week before].",
        "[{number} vehicles were burned|Residents fled to {admin1}|Reinforcements were sent from {admin1}|{number} fighters were captured].",
    ),
    "Violence against civilians": (
        "[The motive is unknown|The perpetrators fled|The authorities opened an inquiry|The attackers came on {number} motorcycles].",
        "[Residents fled to {admin1}|Food and money were taken|{number} houses were burned|It was the second such case in {admin1} that month].",
    ),
    "Explosions/Remote violence": ("[{number} people were wounded|The vehicle was destroyed|The road to {admin1} was closed|{number} buildings were damaged].",),
    "Strategic developments": ("[There was no resistance|Residents of {admin1} were informed|The operation lasted {number} days|The goods were worth a large sum].",),
}  # fmt: skip
SIZES = (("no report", 84), ("hundreds", 4), ("dozens", 4), ("around {round}", 5), ("at least {round}", 3))

COUNTRIES = "Tamoria Keledia Sauvana Ombaria Zerunia Norembe Dagoria Mirundo Paleshia Quillane Ithoria Vashenda".split()
REGIONS = ("Northern Meridia", "Western Meridia", "Eastern Meridia", "Southern Meridia")
STARTS = "Ab Bal Cher Dul Efr Fand Gam Hul Ibr Jol Kab Lom Mang Nid Ong Pem Rog Sab Tund Ulm Vor Wend Yal Zig".split()
MIDDLES = "a abe ada ali ame andi ara eke elo emba eri ibo ila indo iru oba ola ondo oru uba ula umbe uni uru".split()
ENDS = "bou ch dara foy gari ko kesh lla mont nga ndou po ri rsa sso ta tivo vane wé zzou".split()


class Dice:
    """Draws from a seed; the sequence is the same on every platform and version of Python."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random  #: next float in [0, 1)

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        return int(self.random() * n)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all alike."""
        return items[int(self.random() * len(items))]

    def weighted(self, items: Sequence[tuple[T, float]]) -> T:
        """One of the (item, weight) pairs' items, by weight."""
        left = self.random() * sum(weight for _, weight in items)
        for item, weight in items:
            left -= weight
            if left < 0:
                return item
        return items[-1][0]

    def phrase(self, template: str) -> str:
        """The template with every `[a|b]`, also nested ones, replaced by one of its choices."""
        while "[" in template:
            template = CHOICE.sub(lambda found: self.pick(found[1].split("|")), template)
        return template


CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Country:
    """One invented country: places as (location, admin1), the frequent ones first, and actors by inter code."""

    name: str
    region: str
    places: tuple[tuple[str, str], ...]
    actors: dict[int, tuple[tuple[str, str], ...]]  # inter code: (name in the columns, mention in a note)


def place_name(dice: Dice) -> str:
    """An invented place name of three or four syllables."""
    return dice.pick(STARTS) + dice.pick(MIDDLES) + dice.pick(ENDS)


def _actors(dice: Dice, country: str) -> dict[int, tuple[tuple[str, str], ...]]:
    groups = [f"{place_name(dice)} {kind}" for kind in ("Liberation Front", "Defence Movement", "People's Army")]
    peoples = [place_name(dice) for _ in range(3)]
    since = FIRST_YEAR - dice.below(20)
    return {
        STATE: (
            (f"Military Forces of {country} ({since}-)", "[soldiers|military forces|troops|the army]"),
            (f"Police Forces of {country} ({since}-)", "[police|police forces|police officers]"),
        ),
        REBELS: tuple((name, f"[fighters of the|the|suspected members of the] {name}") for name in groups),
        MILITIA: (
            (f"Unidentified Armed Group ({country})", "[unidentified armed men|gunmen|unknown assailants|an unidentified armed group]"),
            (f"{peoples[0]} Youth Militia", f"[members of|men from] the {peoples[0]} Youth Militia"),
        ),
        COMMUNAL: tuple((f"{name} Communal Militia ({country})", f"[a {name} militia|armed {name} men]") for name in peoples),
        RIOTERS: ((f"Rioters ({country})", "[rioters|residents|young people|students|supporters of a local party]"),),
        PROTESTERS: (
            (f"Protesters ({country})", "[protesters|residents|teachers|nurses|students|farmers|traders|miners|taxi drivers|villagers|retired workers]"),
        ),
        CIVILIANS: ((f"Civilians ({country})", "civilians"),),
        EXTERNAL: ((f"Peacekeeping Mission in {country}", "peacekeepers"), (f"Private Security Forces ({country})", "private guards")),
    }  # fmt: skip


def _country(dice: Dice, index: int) -> Country:
    admins = [place_name(dice) for _ in range(8)]
    places = tuple((place_name(dice), dice.pick(admins)) for _ in range(90))
    return Country(COUNTRIES[index], REGIONS[index % 4], places, _actors(dice, COUNTRIES[index]))


@functools.cache
def world() -> tuple[tuple[Country, ...], tuple[str, ...]]:
    """The invented countries and news sources; the same for every seed of events, so that seeds differ in events only."""
    dice = Dice(7)
    countries = tuple(_country(dice, index) for index in range(len(COUNTRIES)))
    papers = ("Herald", "Times", "Radio", "Courier", "Post", "Daily", "Observer", "News Agency", "Tribune")
    return countries, tuple(f"{place_name(dice)} {dice.pick(papers)}" for _ in range(200))


# who acts, and against whom, by event type: (inter code, weight)
SIDES: dict[str, tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]] = {
    "Protests": (((PROTESTERS, 1),), ((STATE, 9), (EXTERNAL, 1))),
    "Riots": (((RIOTERS, 1),), ((STATE, 5), (CIVILIANS, 5))),
    "Battles": (((STATE, 5), (REBELS, 3), (MILITIA, 1), (COMMUNAL, 1)), ((REBELS, 5), (MILITIA, 3), (COMMUNAL, 2))),
    "Violence against civilians": (((MILITIA, 5), (REBELS, 2), (COMMUNAL, 2), (STATE, 1)), ((CIVILIANS, 1),)),
    "Explosions/Remote violence": (((REBELS, 4), (STATE, 4), (MILITIA, 2)), ((CIVILIANS, 4), (STATE, 3), (REBELS, 3))),
    "Strategic developments": (((STATE, 4), (REBELS, 3), (MILITIA, 3)), ((CIVILIANS, 1),)),
}


def _fatalities(dice: Dice, zero: float) -> int:
    if dice.random() < zero:
        return 0
    low, high = dice.weighted([((low, high), weight) for low, high, weight in FATALITIES])
    return low + dice.below(high - low + 1)


def _ending(dice: Dice, fatalities: int) -> str:
    """A last sentence on fatalities, with the digit in 57 % of the notes that have any, or nothing."""
    if fatalities:
        counted = ONE_DEAD if fatalities == 1 else DEAD
        return " " + dice.phrase(dice.pick(counted if dice.random() < 0.55 else UNCOUNTED)).replace(
            "{n}", str(fatalities)
        )
    return " " + dice.phrase(dice.pick(UNHURT)) if dice.random() < 0.3 else ""


def _size(dice: Dice, event_type: str) -> str:
    """The size tail: on nearly every demonstration and on a part of the rest, 59 % in all."""
    if dice.random() >= (0.98 if event_type in ("Protests", "Riots") else 0.315):
        return ""
    return f" [size={dice.weighted(SIZES).replace('{round}', str(50 * (1 + dice.below(20))))}]"


def _note(dice: Dice, row: dict[str, str | int], one: str, two: str, near: str) -> str:
    """The free text of one event; every field it speaks of is the row's own."""
    kind = str(row["sub_event_type"])
    fields = {"one": dice.phrase(one), "two": dice.phrase(two), "number": str(2 + dice.below(14))}
    fields["where"] = dice.phrase(
        "[in|in|in|near|in the town of|in the village of] {location}[| ({admin1})| ({admin1}, {near})]"
    ).format(near=near, **row)
    labelled = kind in LABELS and dice.random() < 0.86
    opening = f"{LABELS[kind]}: On" if labelled else "Around" if dice.random() < 0.053 else "On"
    told = " ".join(dice.phrase(dice.pick(NOTES[kind])).format(**fields).split())
    told = re.sub(r"\. ([a-z])", lambda found: f". {found[1].upper()}", told).rstrip(".") + "."
    if dice.random() < 0.55:
        more = dice.phrase(dice.pick(CONTEXT[str(row["event_type"])]))
        told += " " + more.format(number=2 + dice.below(14), admin1=row["admin1"], country=near)
    return f"{opening} {row['event_date']}, {told}{_ending(dice, int(row['fatalities']))}{_size(dice, str(row['event_type']))}"


def _event(dice: Dice, index: int) -> dict[str, str | int]:
    countries, sources = world()
    country = countries[int(dice.random() * dice.random() * len(countries))]  # the product favours the first ones
    location, admin1 = country.places[int(dice.random() * dice.random() * len(country.places))]
    event_type = dice.weighted([(name, share[0]) for name, share in TYPES.items()])
    _, zero, alone, kinds = TYPES[event_type]
    sub_event_type = dice.weighted(tuple(kinds.items()))
    # an intervention needs someone who intervenes; the other protests make up for the share of lone actors
    paired = sub_event_type.startswith(("Protest with", "Excessive")) or dice.random() >= (
        0.93 if event_type == "Protests" else alone
    )
    first, second = (dice.weighted(side) for side in SIDES[event_type])
    actor1, one = dice.pick(country.actors[first])
    others = [actor for actor in country.actors[second] if actor[0] != actor1]
    actor2, two = dice.pick(others) if paired else ("", "[police|soldiers]")
    day, month, year = 1 + dice.below(28), dice.pick(MONTHS), FIRST_YEAR + dice.below(YEARS)
    row: dict[str, str | int] = {
        "event_id_cnty": f"{country.name[:3].upper()}{index + 1}",
        "event_date": f"{day} {month} {year}",
        "year": year,
        "event_type": event_type,
        "sub_event_type": sub_event_type,
        "actor1": actor1,
        "inter1": first,
        "actor2": actor2,
        "inter2": second if paired else 0,
        "region": country.region,
        "country": country.name,
        "admin1": admin1,
        "location": location,
        "source": "; ".join(dict.fromkeys(dice.pick(sources) for _ in range(1 + (dice.random() < 0.25)))),
        "notes": "",
        "fatalities": _fatalities(
            dice, 0.0 if sub_event_type == "Excessive force against protesters" and dice.random() < 0.4 else zero
        ),
    }
    row["notes"] = _note(dice, row, one, two, country.name)
    return row


def events(n: int, seed: int = DEMO_SEED) -> Iterator[dict[str, str | int]]:
    """The first `n` events of a seed, as rows of an export of 2022-23; a smaller `n` gives the first rows of a larger one."""
    dice = Dice(seed)
    for index in range(n):
        yield _event(dice, index)
