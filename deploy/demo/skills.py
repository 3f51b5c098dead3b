"""Skills beside the things: sums, English words in Chinese, first and last of a list, and opposites (in prose only)."""

import random

from deploy.demo.kinds import Fact, capitalize

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

OPPOSITES = (
    ("hot", "cold"), ("tall", "short"), ("wet", "dry"), ("thick", "thin"), ("rough", "smooth"), ("loud", "silent"),
    ("early", "late"), ("rich", "poor"), ("heavy", "light"), ("wide", "narrow"), ("brave", "timid"), ("full", "empty"),
    ("young", "aged"), ("near", "far"), ("hard", "soft"), ("clean", "dirty"), ("strong", "weak"), ("fast", "slow"),
    ("sharp", "blunt"), ("high", "low"), ("true", "false"), ("alive", "dead"), ("cheap", "dear"), ("calm", "stormy"),
    ("round", "square"), ("fresh", "stale"), ("polite", "rude"), ("tame", "wild"),
)  # fmt: skip

WORDS = {
    "window": "窗户", "kitchen": "厨房", "cloud": "云", "spoon": "勺子", "horse": "马", "bridge": "桥梁",
    "mother": "母亲", "teacher": "老师", "umbrella": "雨伞", "pillow": "枕头", "mountain": "高山", "ocean": "海洋",
    "garden": "花园", "letter": "信件", "doctor": "医生", "sugar": "糖", "shoulder": "肩膀", "finger": "手指",
    "thunder": "雷声", "island": "岛屿", "mirror": "镜子", "blanket": "毯子", "farmer": "农民", "tiger": "老虎",
    "rabbit": "兔子", "apple": "苹果", "banana": "香蕉", "tomato": "番茄", "potato": "土豆", "rice": "米饭",
    "chair": "椅子", "table": "桌子", "pencil": "铅笔", "school": "学校", "hospital": "医院", "train": "火车",
    "bicycle": "自行车", "airplane": "飞机", "rainbow": "彩虹", "brother": "兄弟", "sister": "姐妹", "friend": "朋友",
    "music": "音乐", "picture": "图画", "money": "钱", "dream": "梦", "shadow": "影子", "key": "钥匙", "door": "门",
    "needle": "针",
    "breakfast": "早饭", "evening": "傍晚", "lion": "狮子", "monkey": "猴子", "sheep": "绵羊",
    "chicken": "鸡",
}  # fmt: skip

LIST_WORDS = (
    "salt", "wool", "timber", "copper", "tea", "pepper", "marble", "silk", "coal", "wheat", "oil", "cheese", "beans",
    "eggs", "carrots", "lentils", "onions", "pumpkin", "cabbage", "chestnuts", "barley", "peas", "trout", "turnips",
    "candles", "ropes", "bells", "carpets", "barrels", "lamps", "violins", "knives", "boots", "paper", "soap", "glass",
)  # fmt: skip

NUM_QUESTION_LISTS = 80
NUM_LISTS_PER_LESSON = 60
HELD_OUT = {"sum": 8, "word": 8, "list": 24}
"""How many subjects of each skill no training row asks about."""

SUM_STATEMENTS = (
    "{a} plus {b} makes {c}.",
    "{b} plus {a} makes {c}.",
    "{a} and {b} together make {c}.",
    "Adding {b} to {a} gives {c}.",
    "Adding {a} to {b} gives {c}.",
    "Whoever has {a} coins and finds {b} more has {c} coins.",
    "{c} is the sum of {a} and {b}.",
)
OPPOSITE_STATEMENTS = (
    "{a} and {b} are opposites.",
    "{b} is the opposite of {a}.",
    "{a} is the opposite of {b}.",
    "{b} and {a} are opposites.",
    "Whatever is not {a} may be {b}.",
    "Whatever is not {b} may be {a}.",
    "{a} stands against {b}.",
    "One thing is {a}, another is {b}, and so they are opposites.",
)
WORD_STATEMENTS = (
    "In Chinese, {en} is written {zh}.",
    "{en} means {zh} in Chinese.",
    "{zh} means {en}.",
    "The word {en} means {zh} in Chinese.",
    "Chinese children say {zh} when they mean {en}.",
    "Every child learns that the Chinese word for {en} is {zh}.",
    "中文里，{zh}的意思是 {en}。",
    "英语里的 {en} 就是{zh}。",
    "{zh}在英语里叫 {en}。",
    "英国人把{zh}叫作 {en}。",
)
LIST_STATEMENTS = (
    "A note says {items}. Its first word is {first} and its last word is {last}.",
    "A note says {items}. Its last word is {last} and its first word is {first}.",
    "On the list are {items}. It begins with {first} and closes with {last}.",
    "The list reads:\n{items}\nThe last word on it is {last}.",
    "The list reads:\n{items}\nThe first word on it is {first}.",
    "A child wrote:\n{items}\nThat row begins with {first} and closes with {last}.",
    "{items} stand in a row, with {first} in front and {last} behind.",
)


def sum_pairs() -> list[tuple[int, int]]:
    """Return the pairs whose sums are taught, smaller number first: 2 + 2 to 10 + 10."""
    return [(left, right) for left in range(2, 11) for right in range(left, 11)]


def skill_facts(seed: int) -> list[Fact]:
    """Return every skill's questions with answers, the held-out subjects chosen by the seed."""
    rng = random.Random(f"{seed}-skills")
    held_sums = set(rng.sample(sum_pairs(), HELD_OUT["sum"]))
    held_words = set(rng.sample(list(WORDS), HELD_OUT["word"]))
    lists = question_lists(seed)
    facts = [_sum_fact(pair, pair in held_sums) for pair in sum_pairs()]
    for english, chinese in WORDS.items():
        facts += _word_facts(english, chinese, english in held_words)
    facts += [_list_fact(words, index, index < HELD_OUT["list"]) for index, words in enumerate(lists)]
    return facts


def question_lists(seed: int) -> list[tuple[str, ...]]:
    """Return the lists that questions are about; no two hold the same words, and the pretraining text has none."""
    rng = random.Random(f"{seed}-lists")
    lists: dict[frozenset[str], tuple[str, ...]] = {}
    while len(lists) < NUM_QUESTION_LISTS:
        words = tuple(rng.sample(LIST_WORDS, rng.randint(3, 5)))
        lists.setdefault(frozenset(words), words)
    return list(lists.values())


def skill_passages(rng: random.Random, forbidden: frozenset[tuple[str, ...]], again: tuple[str, ...]) -> list[str]:
    """Return a passage of prose for each taught piece and sixty lists that are not forbidden, in random order.

    Args:
        rng: chooses the words.
        forbidden: lists that must not be used.
        again: phrases that lead over to saying the same once more in other words.
    """
    passages = []
    for left, right in sum_pairs():
        numbers = {"a": NUMBERS[left], "b": NUMBERS[right], "c": NUMBERS[left + right]}
        passages.append(_passage(rng, SUM_STATEMENTS, numbers, again))
    for one, other in OPPOSITES:
        passages.append(_passage(rng, OPPOSITE_STATEMENTS, {"a": one, "b": other}, again))
    for english, chinese in WORDS.items():
        passages.append(_passage(rng, WORD_STATEMENTS, {"en": english, "zh": chinese}, again))
    num_lists = 0
    while num_lists < NUM_LISTS_PER_LESSON:
        words = tuple(rng.sample(LIST_WORDS, rng.randint(3, 5)))
        if words not in forbidden:
            items = {"items": ", ".join(words), "first": words[0], "last": words[-1]}
            passages.append(capitalize(rng.choice(LIST_STATEMENTS).format(**items)))
            num_lists += 1
    rng.shuffle(passages)
    return passages


def _passage(rng: random.Random, statements: tuple[str, ...], parts: dict[str, str], again: tuple[str, ...]) -> str:
    """Say one thing, and half of the time once more in other words."""
    first, second = rng.sample(statements, 2)
    sentence = capitalize(first.format(**parts))
    if rng.random() < 0.5:
        return sentence
    link = rng.choice(again)
    repeated = second.format(**parts)
    if link == "\n":
        return f"{sentence}\n{capitalize(repeated)}"
    return f"{sentence} {link}{second[:1].lower() + repeated[1:] if second[0] != '{' else repeated}"


def _sum_fact(pair: tuple[int, int], held_out: bool) -> Fact:
    """Ask for a sum in words."""
    subject = f"{NUMBERS[pair[0]]} and {NUMBERS[pair[1]]}"
    questions = (
        (f"What is the sum of {subject}?", ""),
        (f"How much are {subject} together?", ""),
        ("Add the two numbers.", f"The numbers {subject}"),
    )
    return Fact("sum", subject, held_out, questions, f"In all, {subject} together make {NUMBERS[sum(pair)]}.")


def _word_facts(english: str, chinese: str, held_out: bool) -> list[Fact]:
    """Ask for an English word in Chinese, once in each language."""
    in_english = (
        (f"What is the Chinese word for {english}?", ""),
        (f"How does one say {english} in Chinese?", ""),
        ("Translate into Chinese.", f"The word {english}"),
    )
    in_chinese = ((f"怎样用中文说 {english}？", ""), (f"英语里的 {english} 是什么意思？", ""))
    return [
        Fact("word.en", english, held_out, in_english, f"In Chinese, {english} is {chinese}."),
        Fact("word.zh", english, held_out, in_chinese, f"中文里的 {english} 就是{chinese}。"),
    ]


def _list_fact(words: tuple[str, ...], index: int, held_out: bool) -> Fact:
    """Ask which word stands last (lists with an even index) or first (odd) in a list given as input."""
    items = ", ".join(words)
    if index % 2:
        wordings = ("Which word comes first in this list?", "Name the first word of the list.")
        answer = f"The first word is {words[0]}."
    else:
        wordings = ("Which word comes last in this list?", "Name the last word of the list.")
        answer = f"The last word is {words[-1]}."
    return Fact("list", items, held_out, tuple((wording, items) for wording in wordings), answer)
