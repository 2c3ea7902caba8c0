"""Make `chat.jsonl.gz` of the sample corpus: short conversations in Korean and English, generated from a seed.

    python makers/sample_chat.py

Every kind of question is a function of a random generator that returns question, thought and answer in both languages.
The answers follow from the question and from facts that occur in several wordings, so a model that is tuned on most of
the conversations answers the others better. Answers are computed or looked up in the tables here, never random.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sample_corpus import SAMPLE, packed

ROWS = 640


class Turn(NamedTuple):
    question: str
    answer: str
    thought: str = ""
    word: str = ""  # the answer in one word, if there is one


Pair = tuple[Turn, Turn]  # English, Korean
CAPITALS = [
    ("South Korea", "Seoul", "대한민국", "서울"), ("Japan", "Tokyo", "일본", "도쿄"),
    ("China", "Beijing", "중국", "베이징"), ("France", "Paris", "프랑스", "파리"),
    ("Germany", "Berlin", "독일", "베를린"), ("Italy", "Rome", "이탈리아", "로마"),
    ("Spain", "Madrid", "스페인", "마드리드"), ("Egypt", "Cairo", "이집트", "카이로"),
    ("Kenya", "Nairobi", "케냐", "나이로비"), ("Peru", "Lima", "페루", "리마"),
    ("Cuba", "Havana", "쿠바", "아바나"), ("Norway", "Oslo", "노르웨이", "오슬로"),
]  # fmt: skip
WORDS = [
    ("water", "물"), ("fire", "불"), ("tree", "나무"), ("cat", "고양이"), ("dog", "개"), ("bird", "새"),
    ("book", "책"), ("sky", "하늘"), ("sea", "바다"), ("river", "강"), ("mountain", "산"), ("moon", "달"),
    ("star", "별"), ("flower", "꽃"), ("bread", "빵"), ("door", "문"), ("hand", "손"), ("snow", "눈"),
    ("wind", "바람"), ("house", "집"),
]  # fmt: skip
OPPOSITES = [
    ("big", "small", "큰", "작은"), ("hot", "cold", "뜨거운", "차가운"), ("new", "old", "새로운", "오래된"),
    ("fast", "slow", "빠른", "느린"), ("high", "low", "높은", "낮은"), ("light", "dark", "밝은", "어두운"),
    ("long", "short", "긴", "짧은"), ("wide", "narrow", "넓은", "좁은"),
]  # fmt: skip
UNITS = [
    ("metres", "centimetres", "미터", "센티미터", 100), ("kilometres", "metres", "킬로미터", "미터", 1000),
    ("hours", "minutes", "시간", "분", 60), ("minutes", "seconds", "분", "초", 60), ("weeks", "days", "주", "일", 7),
    ("kilograms", "grams", "킬로그램", "그램", 1000), ("days", "hours", "일", "시간", 24),
]  # fmt: skip
DAYS = [
    ("Monday", "월요일"), ("Tuesday", "화요일"), ("Wednesday", "수요일"), ("Thursday", "목요일"), ("Friday", "금요일"),
    ("Saturday", "토요일"), ("Sunday", "일요일"),
]  # fmt: skip
SYSTEM = ["You are a helpful assistant.", "당신은 친절한 도우미입니다."]
QUOTE = "'"
BRIEF = ["Answer in one word.", "한 단어로 대답하세요."]


def particle(word: str, closed: str, opened: str, quote: str = "") -> str:
    """A Korean word, quoted if `quote` is given, with its particle: `closed` after a final consonant."""
    return f"{quote}{word}{quote}{closed if (ord(word[-1]) - ord('가')) % 28 else opened}"


def capital(r: random.Random) -> Pair:
    country, city, country_ko, city_ko = r.choice(CAPITALS)
    asked = [f"What is the capital of {country}?", f"Which city is the capital of {country}?", f"Capital of {country}?"]
    asked_ko = [
        f"{country_ko}의 수도는 어디인가요?",
        f"{country_ko}의 수도를 알려 주세요.",
        f"{particle(country_ko, '은', '는')} 수도가 어디죠?",
    ]
    return (
        Turn(r.choice(asked), f"The capital of {country} is {city}.", word=city),
        Turn(r.choice(asked_ko), f"{country_ko}의 수도는 {city_ko}입니다.", word=city_ko),
    )


def translation(r: random.Random) -> Pair:
    english, korean = r.choice(WORDS)
    asked = [
        f'How do you say "{english}" in Korean?',
        f'Translate "{english}" into Korean.',
        f'What is "{english}" in Korean?',
    ]
    back = [f"'{korean}'의 영어 단어는 무엇인가요?", f"{particle(korean, '을', '를', QUOTE)} 영어로 옮겨 주세요."]
    return (
        Turn(r.choice(asked), f'"{english}" is {korean} in Korean.', word=korean),
        Turn(r.choice(back), f"{korean}의 영어 단어는 {english}입니다.", word=english),
    )


def opposite(r: random.Random) -> Pair:
    one, other, one_ko, other_ko = r.choice([*OPPOSITES, *((b, a, d, c) for a, b, c, d in OPPOSITES)])
    asked = [f'What is the opposite of "{one}"?', f'Name the opposite of "{one}".']
    asked_ko = [f"'{one_ko}'의 반대말은 무엇인가요?", f"'{one_ko}'의 반대말을 말해 주세요."]
    return (
        Turn(r.choice(asked), f'The opposite of "{one}" is "{other}".', word=other),
        Turn(r.choice(asked_ko), f"'{one_ko}'의 반대말은 '{other_ko}'입니다.", word=other_ko),
    )


def conversion(r: random.Random) -> Pair:
    big, small, big_ko, small_ko, factor = r.choice(UNITS)
    n = r.randint(2, 9)
    work = f"{n} × {factor} = {n * factor}"
    asked = [f"How many {small} are {n} {big}?", f"Convert {n} {big} to {small}."]
    asked_ko = [
        f"{n}{particle(big_ko, '은', '는')} 몇 {small_ko}인가요?",
        f"{n}{particle(big_ko, '을', '를')} {small_ko} 단위로 바꿔 주세요.",
    ]
    return (
        Turn(r.choice(asked), f"{n} {big} are {n * factor} {small}.", work, str(n * factor)),
        Turn(
            r.choice(asked_ko),
            f"{n}{particle(big_ko, '은', '는')} {n * factor}{small_ko}입니다.",
            work,
            str(n * factor),
        ),
    )


def total(r: random.Random) -> Pair:
    a, b = r.randint(1, 9), r.randint(1, 9)
    work = f"{a} + {b} = {a + b}"
    return (
        Turn(r.choice([f"What is {a} + {b}?", f"Add {a} and {b}."]), f"The sum is {a + b}.", work, str(a + b)),
        Turn(r.choice([f"{a} 더하기 {b} 계산해 주세요.", f"{a} + {b} = ?"]), f"합은 {a + b}입니다.", work, str(a + b)),
    )


def day(r: random.Random) -> Pair:
    place, after = r.randrange(7), r.random() < 0.5
    (english, korean), (then, then_ko) = DAYS[place], DAYS[(place + (1 if after else -1)) % 7]
    return (
        Turn(f"Which day comes {'after' if after else 'before'} {english}?", f"It is {then}.", word=then),
        Turn(f"{korean}의 {'다음 날' if after else '전날'}은 무슨 요일인가요?", f"{then_ko}입니다.", word=then_ko),
    )


def code(r: random.Random) -> Pair:
    english, korean = r.choice(WORDS)
    n = r.randint(2, 5)
    program = "```python\nfor _ in range({}):\n    print({!r})\n```"
    return (
        Turn(f'Write Python that prints "{english}" {n} times.', program.format(n, english)),
        Turn(
            f"{particle(korean, '을', '를', QUOTE)} {n}번 출력하는 파이썬 코드를 써 주세요.", program.format(n, korean)
        ),
    )


KINDS: list[Callable[[random.Random], Pair]] = [capital, translation, opposite, conversion, total, day, code]


def conversations(count: int, seed: int = 0) -> Iterator[dict[str, object]]:
    """Distinct conversations of one to three turns, alternating between English and Korean.

    One in five starts with a general system prompt; one in eight asks for a one-word answer and gets it; half of the
    calculations are answered after a thought.
    """
    r, known, number = random.Random(seed), set[str](), 0
    while number < count:
        korean, brief = number % 2, r.random() < 0.125
        turns = [kind(r)[korean] for kind in r.sample(KINDS, r.choice([1, 1, 2, 3]))]
        if brief:
            turns = [turn for turn in turns if turn.word][:1]
        prompt = BRIEF[korean] if brief else SYSTEM[korean] if r.random() < 0.2 else ""
        messages = [{"role": "system", "content": prompt}] if prompt else []
        for turn in turns:
            thought = f"<think>{turn.thought}</think>" if turn.thought and not brief and r.random() < 0.5 else ""
            answer = turn.word if brief else f"{thought}{turn.answer}"
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
        if turns and (key := json.dumps(messages)) not in known:
            known.add(key)
            yield {"messages": messages, "source": f"generated/chat-{seed}-{number}", "licence": "Apache-2.0"}
            number += 1


def main() -> None:
    rows = list(conversations(ROWS))
    data = packed(rows)
    (SAMPLE / "chat.jsonl.gz").write_bytes(data)
    print(f"chat: {len(rows)} conversations, {len(data)} bytes compressed")


if __name__ == "__main__":
    main()
