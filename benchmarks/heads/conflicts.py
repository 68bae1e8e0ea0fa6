"""Prompts in which the context contradicts what a language model knows, for finding and measuring.

Facts: "The capital of France is Rome. The capital of France is …", in the manner of the paper's
World Capital prompts, over eleven relations written here; a relation is used for one purpose alone.
Passages: questions of Natural Questions with their gold passage, in which the answer is replaced
by the answer to another question of the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rag_prune.heads import Conflict

# A statement, up to where the object starts, and its facts as "subject: object".
RELATIONS = {
    "capital": (
        "The capital of {} is",
        "France: Paris; Italy: Rome; Germany: Berlin; Spain: Madrid; Japan: Tokyo; Russia: Moscow; "
        "Egypt: Cairo; Greece: Athens; Portugal: Lisbon; Austria: Vienna; Poland: Warsaw; "
        "Cuba: Havana; Peru: Lima; Kenya: Nairobi; Iran: Tehran; Iraq: Baghdad; "
        "Sweden: Stockholm; Norway: Oslo; Finland: Helsinki; Denmark: Copenhagen; China: Beijing; "
        "Thailand: Bangkok; Ireland: Dublin; Hungary: Budapest; Turkey: Ankara; Canada: Ottawa; "
        "Afghanistan: Kabul; Belgium: Brussels; Bulgaria: Sofia; Chile: Santiago; "
        "Colombia: Bogotá; Ethiopia: Addis Ababa; Syria: Damascus; South Korea: Seoul; "
        "Argentina: Buenos Aires; Romania: Bucharest; Ukraine: Kyiv; Vietnam: Hanoi",
    ),
    "language": (
        "The official language of {} is",
        "Brazil: Portuguese; Mexico: Spanish; Germany: German; Italy: Italian; Japan: Japanese; "
        "China: Chinese; Egypt: Arabic; Russia: Russian; Greece: Greek; Poland: Polish; "
        "Turkey: Turkish; Sweden: Swedish; Finland: Finnish; Denmark: Danish; France: French; "
        "Hungary: Hungarian; Thailand: Thai; Vietnam: Vietnamese; Argentina: Spanish; "
        "Portugal: Portuguese; Australia: English; Austria: German; Saudi Arabia: Arabic; "
        "South Korea: Korean; Norway: Norwegian; Ukraine: Ukrainian; Chile: Spanish; Iraq: Arabic",
    ),
    "sport": (
        "{} is famous for playing the sport of",
        "Michael Jordan: basketball; LeBron James: basketball; Kobe Bryant: basketball; "
        "Tiger Woods: golf; Jack Nicklaus: golf; Roger Federer: tennis; Serena Williams: tennis; "
        "Rafael Nadal: tennis; Andre Agassi: tennis; Babe Ruth: baseball; Hank Aaron: baseball; "
        "Mickey Mantle: baseball; Wayne Gretzky: hockey; Bobby Orr: hockey; "
        "Lionel Messi: football; Cristiano Ronaldo: football; Tom Brady: football; "
        "Peyton Manning: football; Sachin Tendulkar: cricket; Brian Lara: cricket; "
        "Magic Johnson: basketball; Larry Bird: basketball; Pete Sampras: tennis",
    ),
    "young": (
        "A baby {} is called a",
        "dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; bear: cub; lion: cub; "
        "deer: fawn; goat: kid; duck: duckling; goose: gosling; frog: tadpole; kangaroo: joey; "
        "pig: piglet; chicken: chick; swan: cygnet; tiger: cub; elephant: calf; whale: calf; "
        "wolf: pup; seal: pup; butterfly: caterpillar; rabbit: bunny; koala: joey",
    ),
    "currency": (
        "The currency of {} is the",
        "Japan: yen; India: rupee; Mexico: peso; Russia: ruble; China: yuan; Brazil: real; "
        "Switzerland: franc; Thailand: baht; South Korea: won; Poland: zloty; Turkey: lira; "
        "South Africa: rand; Israel: shekel; Hungary: forint; Vietnam: dong; Germany: euro; "
        "France: euro; Italy: euro; Spain: euro; Canada: dollar; Australia: dollar; "
        "Pakistan: rupee; Nepal: rupee; Argentina: peso; Chile: peso; the United Kingdom: pound; "
        "Egypt: pound; Kuwait: dinar; Iraq: dinar; Sweden: krona; Philippines: peso",
    ),
    "continent": (
        "{} is a country on the continent of",
        "France: Europe; Spain: Europe; Italy: Europe; Germany: Europe; Poland: Europe; "
        "Sweden: Europe; Greece: Europe; Portugal: Europe; Austria: Europe; Hungary: Europe; "
        "Nigeria: Africa; Kenya: Africa; Ghana: Africa; Egypt: Africa; Ethiopia: Africa; "
        "Morocco: Africa; Uganda: Africa; Tanzania: Africa; Zambia: Africa; Mali: Africa; "
        "China: Asia; Japan: Asia; India: Asia; Thailand: Asia; Vietnam: Asia; Mongolia: Asia; "
        "Nepal: Asia; Pakistan: Asia; Malaysia: Asia; Iran: Asia",
    ),
    "city": (
        "{} is a city in the country of",
        "Munich: Germany; Hamburg: Germany; Lyon: France; Marseille: France; Milan: Italy; "
        "Naples: Italy; Venice: Italy; Barcelona: Spain; Seville: Spain; Osaka: Japan; "
        "Kyoto: Japan; Shanghai: China; Guangzhou: China; Mumbai: India; Kolkata: India; "
        "Chennai: India; Toronto: Canada; Vancouver: Canada; Sydney: Australia; "
        "Melbourne: Australia; Lagos: Nigeria; Karachi: Pakistan; Lahore: Pakistan; "
        "Alexandria: Egypt; Istanbul: Turkey; Rotterdam: Netherlands; Porto: Portugal; "
        "Krakow: Poland; Geneva: Switzerland; Zurich: Switzerland; Busan: Korea; "
        "Guadalajara: Mexico; Durban: South Africa; Kandahar: Afghanistan; Haifa: Israel",
    ),
    "landmark": (
        "{} can be visited in the country of",
        "The Eiffel Tower: France; The Louvre: France; The Colosseum: Italy; "
        "The Leaning Tower of Pisa: Italy; The Great Wall: China; The Forbidden City: China; "
        "The Taj Mahal: India; Mount Fuji: Japan; The Pyramids of Giza: Egypt; "
        "The Great Sphinx: Egypt; Machu Picchu: Peru; The Acropolis: Greece; "
        "The Parthenon: Greece; The Kremlin: Russia; The Brandenburg Gate: Germany; "
        "Angkor Wat: Cambodia; The Sydney Opera House: Australia; Ayers Rock: Australia; "
        "Petra: Jordan; The Sagrada Familia: Spain; The Alhambra: Spain; Chichen Itza: Mexico; "
        "Hagia Sophia: Turkey; The Versailles Palace: France; Mount Kilimanjaro: Tanzania",
    ),
    "author": (
        "{} was written by",
        "Hamlet: William Shakespeare; Macbeth: William Shakespeare; "
        "Romeo and Juliet: William Shakespeare; Oliver Twist: Charles Dickens; "
        "Great Expectations: Charles Dickens; A Tale of Two Cities: Charles Dickens; "
        "Pride and Prejudice: Jane Austen; Emma: Jane Austen; Moby-Dick: Herman Melville; "
        "War and Peace: Leo Tolstoy; Anna Karenina: Leo Tolstoy; The Odyssey: Homer; "
        "The Iliad: Homer; Don Quixote: Miguel de Cervantes; The Great Gatsby: F. Scott; "
        "Frankenstein: Mary Shelley; Dracula: Bram Stoker; The Hobbit: J.R.R. Tolkien; "
        "Animal Farm: George Orwell; The Lord of the Rings: J.R.R. Tolkien; "
        "To Kill a Mockingbird: Harper Lee; The Divine Comedy: Dante; Faust: Johann Wolfgang; "
        "The Old Man and the Sea: Ernest Hemingway; Tom Sawyer: Mark Twain; "
        "Crime and Punishment: Fyodor Dostoevsky; Walden: Henry David Thoreau",
    ),
    "maker": (
        "The company that makes the {} is",
        "iPhone: Apple; iPad: Apple; Macintosh: Apple; MacBook: Apple; Xbox: Microsoft; "
        "Windows 95: Microsoft; Surface tablet: Microsoft; PlayStation: Sony; Walkman: Sony; "
        "Game Boy: Nintendo; Wii: Nintendo; Corolla: Toyota; Prius: Toyota; Civic: Honda; "
        "Accord: Honda; Mustang: Ford; Model T: Ford; Camaro: Chevrolet; Corvette: Chevrolet; "
        "Kindle: Amazon; Galaxy phone: Samsung; Android phone: Google; Pixel phone: Google; "
        "747 airplane: Boeing; A380 airplane: Airbus; Photoshop program: Adobe; ThinkPad: IBM; "
        "Pentium processor: Intel; Beetle car: Volkswagen; Golf car: Volkswagen",
    ),
    "born": (
        "{} was born in the country of",
        "Albert Einstein: Germany; Ludwig van Beethoven: Germany; Karl Marx: Germany; "
        "Wolfgang Amadeus Mozart: Austria; Sigmund Freud: Austria; Adolf Hitler: Austria; "
        "Napoleon Bonaparte: France; Claude Monet: France; Victor Hugo: France; "
        "Leonardo da Vinci: Italy; Galileo Galilei: Italy; Michelangelo: Italy; "
        "Mahatma Gandhi: India; Jawaharlal Nehru: India; Nelson Mandela: South Africa; "
        "Isaac Newton: England; Charles Darwin: England; William Shakespeare: England; "
        "Pablo Picasso: Spain; Salvador Dali: Spain; Mao Zedong: China; Confucius: China; "
        "Vincent van Gogh: Netherlands; Rembrandt: Netherlands; Marie Curie: Poland; "
        "Frederic Chopin: Poland; Leo Tolstoy: Russia; Vladimir Lenin: Russia; Plato: Greece; "
        "Aristotle: Greece; Akira Kurosawa: Japan; Frida Kahlo: Mexico",
    ),
}
SPLIT = {
    "find": ("capital", "language", "sport"),
    "dev": ("young", "continent", "currency"),
    "test": ("city", "landmark", "author", "maker", "born"),
}


@dataclass(frozen=True)
class Fact:
    """`statement` has a {} for the subject and ends before the object."""

    relation: str
    statement: str
    subject: str
    answer: str

    @property
    def bare(self) -> str:
        """The prompt without a context."""
        return self.statement.format(self.subject)

    def told(self, answer: str) -> str:
        """The prompt after a context that gives `answer`."""
        return f"{self.bare} {answer}. {self.bare}"


def facts(relations: Iterable[str]) -> list[Fact]:
    return [
        Fact(relation, RELATIONS[relation][0], *(part.strip() for part in pair.split(":")))
        for relation in relations
        for pair in RELATIONS[relation][1].split(";")
    ]


def conflicts(known: Sequence[Fact], seed: int = 0) -> list[Conflict]:
    """Each fact told wrong, corrupted by another fact of its relation told wrong.

    The wrong answer and the corrupted prompt's subject and answer are drawn at random from the
    facts of the relation, none of whose answers starts like another of them.
    """
    rng = np.random.default_rng(seed)
    made = []
    for fact in known:
        others = facts([fact.relation])
        others = [others[i] for i in rng.permutation(len(others))]
        used = [fact.answer[:3]]
        drawn: list[Fact] = []
        for other in others:
            if other.answer[:3] not in used and len(drawn) < 3:
                used.append(other.answer[:3])
                drawn.append(other)
        if len(drawn) == 2:  # a relation with three objects
            drawn.append(drawn[0])
        wrong, subject, subject_wrong = drawn
        made.append(
            Conflict(
                prompt=fact.told(wrong.answer),
                corrupted=subject.told(subject_wrong.answer),
                memory=f" {fact.answer}",
                context=f" {wrong.answer}",
            )
        )
    return made


@dataclass(frozen=True)
class Passage:
    """A question whose passage tells `answers[0]`, and the same passage telling `replacement`."""

    question: str
    kind: str
    answers: tuple[str, ...]
    faithful: str
    replacement: str
    counterfactual: str


MONTH = r"January|February|March|April|May|June|July|August|September|October|November|December"


def kind(question: str, answer: str) -> str | None:
    """What the answer is, by its form and the question's first word; None when it is not plain."""
    if re.fullmatch(r"(1[0-9]|20)\d\d", answer):
        return "year"
    if re.fullmatch(rf"({MONTH}) \d{{1,2}}, \d{{4}}", answer):
        return "date"
    if re.fullmatch(r"\d[\d,.]*|two|three|four|five|six|seven|eight|nine|ten|twelve", answer):
        return "number"
    first = question.split()[0].lower()
    if re.fullmatch(r"[A-Z]\w+( [A-Z]\w*\.?)?( [A-Z]\w+)+", answer) and first == "who":
        return "person"
    if re.fullmatch(r"(the )?[A-Z]\w+([, ]+[A-Z]\w+)*", answer) and first == "where":
        return "place"
    return None


def passages(rows: Iterable[Mapping[str, Any]], words: int = 60, seed: int = 0) -> list[Passage]:
    """Questions whose answer is of a plain kind, with some `words` words around it."""
    rng = np.random.default_rng(seed)
    pool = []
    for row in rows:
        [gold] = [c for c in row["ctxs"] if c["isgold"]][:1] or [None]
        if gold is None:
            continue
        for answer in row["answers"]:
            what = kind(row["question"], answer)
            found = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", gold["text"])
            asked = any(a.lower() in row["question"].lower() for a in row["answers"])
            if what and found and not asked:
                text = _around(gold["text"], found.start(), words)
                if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
                    pool.append((row["question"], what, answer, tuple(row["answers"]), text))
                break
    made = []
    for question, what, answer, answers, text in pool:
        same = [p[2] for p in pool if p[1] == what]
        drawn = [same[i] for i in rng.permutation(len(same))]
        lower = text.lower()
        # Neither in the passage nor like the answer; two wordings of an answer count as one.
        fits = [d for d in drawn if d.lower() not in lower and d[:4] != answer[:4]]
        fits = [d for d in fits if not any(a.lower() in d.lower() for a in answers)]
        if not fits:
            continue
        swapped = re.sub(rf"(?<!\w){re.escape(answer)}(?!\w)", lambda _, to=fits[0]: to, text)
        if any(a.lower() in swapped.lower() for a in answers):  # told in other words as well
            continue
        made.append(Passage(question, what, answers, text, fits[0], swapped))
    return made


def _around(text: str, at: int, words: int) -> str:
    """The sentence-like piece of the text around a character: `words` words, a third before it."""
    spans = [m.span() for m in re.finditer(r"\S+", text)]
    middle = next(i for i, (_, end) in enumerate(spans) if end > at)
    first = max(0, min(middle - words // 3, len(spans) - words))
    return text[spans[first][0] : spans[min(first + words, len(spans)) - 1][1]]
