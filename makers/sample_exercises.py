"""Worked mathematics exercises in English and Korean, generated from a seed: each has a question, steps and an answer.

Every kind is a function of a random generator that returns the same exercise in both languages, so that numbers and
reasoning agree; a document is a worksheet of exercises in one language. Answers are computed, never written by hand.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple


class Exercise(NamedTuple):
    question: str
    steps: list[str]
    answer: str


Pair = tuple[Exercise, Exercise]  # English, Korean
NAMES = [
    ("Mina", "민아"),
    ("Jun", "준"),
    ("Sora", "소라"),
    ("Tae", "태호"),
    ("Hana", "하나"),
    ("Yuna", "유나"),
    ("Daniel", "다니엘"),
]
THINGS = [
    ("apples", "사과", "개"),
    ("books", "책", "권"),
    ("pencils", "연필", "자루"),
    ("stamps", "우표", "장"),
    ("eggs", "달걀", "개"),
]
SIGNED = {True: "+", False: "-"}


def josa(number: int | str, closed: str, opened: str) -> str:
    """A number with its Korean particle: `closed` if its last digit is read with a final consonant (0 1 3 6 7 8)."""
    return f"{number}{closed if str(number)[-1] in '013678' else opened}"


def direction(number: int | str) -> str:
    """`number` with the particle (으)로, which is 로 after a vowel and after ㄹ (1 7 8)."""
    return f"{number}{'으로' if str(number)[-1] in '036' else '로'}"


def addition(r: random.Random) -> Pair:
    a, b = r.randint(100, 9999), r.randint(100, 9999)
    ta, tb = a // 100 * 100, b // 100 * 100
    ra, rb = a - ta, b - tb
    work = [f"{ta} + {tb} = {ta + tb}", f"{ra} + {rb} = {ra + rb}", f"{ta + tb} + {ra + rb} = {a + b}"]
    en = ["Add the hundreds: ", "Add the rest: ", "Put both together: "]
    ko = ["백의 자리 이상을 더합니다: ", "나머지를 더합니다: ", "두 결과를 합합니다: "]
    return (
        Exercise(f"What is {a} + {b}?", [h + w for h, w in zip(en, work, strict=True)], str(a + b)),
        Exercise(
            f"{a} + {josa(b, '은', '는')} 얼마입니까?", [h + w for h, w in zip(ko, work, strict=True)], str(a + b)
        ),
    )


def multiplication(r: random.Random) -> Pair:
    a, b = r.randint(12, 999), r.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    work = [f"{a} × {tens} = {a * tens}", f"{a} × {ones} = {a * ones}", f"{a * tens} + {a * ones} = {a * b}"]
    return (
        Exercise(f"Calculate {a} × {b}.", [f"Split {b} into {tens} + {ones}.", *work], str(a * b)),
        Exercise(
            f"{a} × {josa(b, '을', '를')} 계산하십시오.",
            [f"{josa(b, '을', '를')} {josa(tens, '과', '와')} {direction(ones)} 나누어 생각합니다.", *work],
            str(a * b),
        ),
    )


def division(r: random.Random) -> Pair:
    d, q = r.randint(3, 48), r.randint(10, 400)
    rest = r.randrange(d)
    n = d * q + rest
    check = f"{d} × {q} + {rest} = {n}"
    return (
        Exercise(
            f"Divide {n} by {d} and give the remainder.",
            [f"{d} goes into {n} at most {q} times: {d} × {q} = {d * q}, "
             f"and {d} × {q + 1} = {d * (q + 1)} is too much.",
             f"The remainder is {n} - {d * q} = {rest}.", f"Check: {check}."],
            f"{q} remainder {rest}",
        ),
        Exercise(
            f"{josa(n, '을', '를')} {direction(d)} 나눈 몫과 나머지를 구하십시오.",
            [f"{d} × {q} = {d * q}이고 {d} × {q + 1} = {d * (q + 1)}이므로 몫은 {q}입니다.",
             f"나머지는 {n} - {d * q} = {rest}입니다.", f"검산하면 {check}입니다."],
            f"몫 {q}, 나머지 {rest}",
        ),
    )  # fmt: skip


def fractions(r: random.Random) -> Pair:
    b, d = r.sample(range(2, 16), 2)
    a, c = r.randint(1, b), r.randint(1, d)
    plus = r.random() < 0.6 or Fraction(a, b) < Fraction(c, d)
    common = math.lcm(b, d)
    x, y = a * common // b, c * common // d
    top = x + y if plus else x - y
    result, sign = Fraction(top, common), SIGNED[plus]
    reduced = math.gcd(top, common) > 1
    line = f"{a}/{b} {sign} {c}/{d} = {x}/{common} {sign} {y}/{common} = {top}/{common}"
    en = [f"The least common multiple of {b} and {d} is {common}.", f"{line}."]
    ko = [f"{josa(b, '과', '와')} {d}의 최소공배수는 {common}입니다.", f"통분하면 {line}입니다."]
    if reduced:
        en.append(f"Dividing top and bottom by {math.gcd(top, common)} gives {result}.")
        ko.append(f"분자와 분모를 {direction(math.gcd(top, common))} 나누면 {result}입니다.")
    return (
        Exercise(f"Compute {a}/{b} {sign} {c}/{d} and simplify.", en, str(result)),
        Exercise(f"{a}/{b} {sign} {c}/{josa(d, '을', '를')} 계산하여 기약분수로 나타내십시오.", ko, str(result)),
    )


def linear(r: random.Random) -> Pair:
    a, x, b = r.randint(2, 15), r.randint(-12, 20), r.randint(1, 40)
    plus = r.random() < 0.5
    c = a * x + (b if plus else -b)
    sign, inverse = SIGNED[plus], SIGNED[not plus]
    right, done = (c - b, "빼면") if plus else (c + b, "더하면")
    return (
        Exercise(
            f"Solve for x: {a}x {sign} {b} = {c}",
            [f"{'Subtract' if plus else 'Add'} {b} on both sides: {a}x = {c} {inverse} {b} = {right}.",
             f"Divide both sides by {a}: x = {right} / {a} = {x}.",
             f"Check: {a} × ({x}) {sign} {b} = {c}."],
            f"x = {x}",
        ),
        Exercise(
            f"방정식 {a}x {sign} {b} = {josa(c, '을', '를')} 푸십시오.",
            [f"양변{'에서' if plus else '에'} {josa(b, '을', '를')} {done} {a}x = {right}입니다.",
             f"양변을 {direction(a)} 나누면 x = {x}입니다.",
             f"대입하여 확인하면 {a} × ({x}) {sign} {b} = {c}입니다."],
            f"x = {x}",
        ),
    )  # fmt: skip


def quadratic(r: random.Random) -> Pair:
    p, q = sorted(r.sample([n for n in range(-9, 10) if n], 2))
    b, c = -(p + q), p * q
    middle = f" {SIGNED[b > 0]} {abs(b) if abs(b) != 1 else ''}x" if b else ""
    equation = f"x^2{middle} {SIGNED[c > 0]} {abs(c)} = 0"
    factors = "".join(f"(x {SIGNED[n < 0]} {abs(n)})" for n in (p, q))
    return (
        Exercise(
            f"Find the roots of {equation}.",
            [f"We look for two numbers whose sum is {p + q} and whose product is {c}.",
             f"They are {p} and {q}, so the left side factors as {factors}.",
             "A product is zero exactly when one of its factors is zero."],
            f"x = {p} or x = {q}",
        ),
        Exercise(
            f"이차방정식 {equation}의 해를 구하십시오.",
            [f"합이 {p + q}이고 곱이 {c}인 두 수를 찾습니다.",
             f"두 수는 {josa(p, '과', '와')} {q}이므로 좌변은 {factors}로 인수분해됩니다.",
             "곱이 0이면 인수 가운데 하나가 0입니다."],
            f"x = {p} 또는 x = {q}",
        ),
    )  # fmt: skip


def system(r: random.Random) -> Pair:
    x, y = r.randint(1, 60), r.randint(1, 60)
    if x < y:
        x, y = y, x
    s, d = x + y, x - y
    return (
        Exercise(
            f"The sum of two numbers is {s} and their difference is {d}. What are the numbers?",
            [f"Call them x and y: x + y = {s} and x - y = {d}.",
             f"Adding both equations gives 2x = {s + d}, so x = {x}.",
             f"Then y = {s} - {x} = {y}."],
            f"{x} and {y}",
        ),
        Exercise(
            f"두 수의 합은 {s}이고 차는 {d}입니다. 두 수를 구하십시오.",
            [f"두 수를 x, y라고 하면 x + y = {s}, x - y = {d}입니다.",
             f"두 식을 더하면 2x = {s + d}이므로 x = {x}입니다.",
             f"따라서 y = {s} - {x} = {y}입니다."],
            f"{josa(x, '과', '와')} {y}",
        ),
    )  # fmt: skip


def rectangle(r: random.Random) -> Pair:
    a, b = r.randint(3, 60), r.randint(3, 60)
    return (
        Exercise(
            f"A rectangle is {a} cm long and {b} cm wide. Find its area and its perimeter.",
            [f"Area = length × width = {a} × {b} = {a * b} square centimetres.",
             f"Perimeter = 2 × ({a} + {b}) = 2 × {a + b} = {2 * (a + b)} cm."],
            f"{a * b} cm² and {2 * (a + b)} cm",
        ),
        Exercise(
            f"가로가 {a} cm, 세로가 {b} cm인 직사각형의 넓이와 둘레를 구하십시오.",
            [f"넓이는 가로 × 세로 = {a} × {b} = {a * b} 제곱센티미터입니다.",
             f"둘레는 2 × ({a} + {b}) = {2 * (a + b)} cm입니다."],
            f"넓이 {a * b} cm², 둘레 {2 * (a + b)} cm",
        ),
    )  # fmt: skip


def pythagoras(r: random.Random) -> Pair:
    n = r.randint(1, 5)
    m = r.randint(n + 1, 9)
    k = r.randint(1, 4)
    a, b, c = k * (m * m - n * n), 2 * k * m * n, k * (m * m + n * n)
    line = f"{a}^2 + {b}^2 = {a * a} + {b * b} = {c * c}"
    return (
        Exercise(
            f"The legs of a right triangle measure {a} and {b}. How long is the hypotenuse?",
            [f"By the Pythagorean theorem, the square of the hypotenuse is {line}.",
             f"The square root of {c * c} is {c}."],
            str(c),
        ),
        Exercise(
            f"직각을 낀 두 변의 길이가 {josa(a, '과', '와')} {b}인 직각삼각형의 빗변의 길이를 구하십시오.",
            [f"피타고라스 정리에 따라 빗변의 제곱은 {line}입니다.", f"{c * c}의 제곱근은 {c}입니다."],
            str(c),
        ),
    )  # fmt: skip


def gcd(r: random.Random) -> Pair:
    g = r.randint(2, 36)
    a, b = sorted((g * r.randint(2, 40), g * r.randint(2, 40)), reverse=True)
    steps, x, y = list[str](), a, b
    while y:
        steps.append(f"{x} = {y} × {x // y} + {x % y}")
        x, y = y, x % y
    return (
        Exercise(
            f"Use the Euclidean algorithm to find the greatest common divisor of {a} and {b}.",
            [*steps, f"The last divisor that leaves no remainder is {x}."],
            str(x),
        ),
        Exercise(
            f"유클리드 호제법을 사용하여 {josa(a, '과', '와')} {b}의 최대공약수를 구하십시오.",
            [*steps, f"나머지가 0이 될 때의 나누는 수는 {x}입니다."],
            str(x),
        ),
    )


def primes(r: random.Random) -> Pair:
    number = math.prod(r.choices([2, 3, 5, 7, 11, 13], weights=[5, 4, 3, 2, 1, 1], k=r.randint(3, 6)))
    rest, factors, steps = number, list[int](), list[str]()
    divisor = 2
    while rest > 1:
        if rest % divisor:
            divisor += 1
            continue
        steps.append(f"{rest} ÷ {divisor} = {rest // divisor}")
        factors.append(divisor)
        rest //= divisor
    product = " × ".join(map(str, factors))
    return (
        Exercise(
            f"Write {number} as a product of primes.",
            [*steps, f"All divisors used are prime: {product}."],
            f"{number} = {product}",
        ),
        Exercise(
            f"{josa(number, '을', '를')} 소인수분해하십시오.",
            [*steps, f"사용한 소수를 모두 곱하면 {product}입니다."],
            f"{number} = {product}",
        ),
    )  # fmt: skip


def percent(r: random.Random) -> Pair:
    price, off = r.randint(2, 400) * 500, r.choice([5, 10, 15, 20, 25, 30, 40, 60])
    cut = price * off // 100
    return (
        Exercise(
            f"A coat costs {price} won and is sold at {off}% off. What is the price now?",
            [f"{off}% of {price} is {price} × {off} / 100 = {cut}.", f"{price} - {cut} = {price - cut}."],
            f"{price - cut} won",
        ),
        Exercise(
            f"정가가 {price}원인 옷을 {off}% 할인하여 팝니다. 판매 가격은 얼마입니까?",
            [f"{price}원의 {off}%는 {price} × {off} / 100 = {cut}원입니다.",
             f"{price} - {cut} = {price - cut}이므로 판매 가격은 {price - cut}원입니다."],
            f"{price - cut}원",
        ),
    )  # fmt: skip


def sharing(r: random.Random) -> Pair:
    (en, ko), (things, thing, unit) = r.choice(NAMES), r.choice(THINGS)
    each, people, left = r.randint(2, 30), r.randint(2, 12), r.randint(0, 9)
    total = each * people + left
    return (
        Exercise(
            f"{en} has {total} {things}, keeps {left} and shares the rest equally among {people} friends. "
            "How many does each friend get?",
            [f"{en} shares {total} - {left} = {total - left} {things}.",
             f"Each friend gets {total - left} ÷ {people} = {each}."],
            f"{each} {things}",
        ),
        Exercise(
            f"{ko} 학생은 {thing} {total}{unit} 가운데 {left}{unit}만 남기고 "
            f"나머지를 친구 {people}명에게 똑같이 나누어 줍니다. 친구 한 명이 받는 {thing}의 수를 구하십시오.",
            [f"나누어 주는 수는 {total} - {left} = {total - left}{unit}입니다.",
             f"한 명이 받는 수는 {total - left} ÷ {people} = {each}{unit}입니다."],
            f"{each}{unit}",
        ),
    )  # fmt: skip


def journey(r: random.Random) -> Pair:
    speed, hours = r.randint(8, 60) * 2, r.randint(1, 9)
    half = r.random() < 0.5
    time, distance = f"{hours}{'.5' if half else ''}", speed * hours + (speed // 2 if half else 0)
    return (
        Exercise(
            f"A train travels at {speed} km per hour. How far does it get in {time} hours?",
            ["Distance is speed multiplied by time.", f"{speed} × {time} = {distance}."],
            f"{distance} km",
        ),
        Exercise(
            f"시속 {speed} km로 달리는 기차가 {time}시간 동안 가는 거리를 구하십시오.",
            ["거리는 속력에 시간을 곱한 값입니다.", f"{speed} × {time} = {distance}입니다."],
            f"{distance} km",
        ),
    )


def progression(r: random.Random) -> Pair:
    first, step, n = r.randint(1, 30), r.randint(2, 15), r.randint(8, 60)
    last = first + (n - 1) * step
    total = n * (first + last) // 2
    shown = ", ".join(str(first + i * step) for i in range(4))
    return (
        Exercise(
            f"An arithmetic progression begins {shown}, … Find its term number {n} and the sum of its first {n} terms.",
            [f"The common difference is {step}, so term {n} is {first} + {n - 1} × {step} = {last}.",
             f"The sum is {n} × ({first} + {last}) / 2 = {total}."],
            f"term {last}, sum {total}",
        ),
        Exercise(
            f"등차수열 {shown}, …의 제{n}항과 첫째항부터 제{n}항까지의 합을 구하십시오.",
            [f"공차가 {step}이므로 제{n}항은 {first} + {n - 1} × {step} = {last}입니다.",
             f"합은 {n} × ({first} + {last}) / 2 = {total}입니다."],
            f"제{n}항 {last}, 합 {total}",
        ),
    )  # fmt: skip


def average(r: random.Random) -> Pair:
    mean, n = r.randint(10, 95), r.randint(3, 6)
    values = [mean + r.randint(-9, 9) for _ in range(n - 1)]
    values.append(mean * n - sum(values))
    row, total = " + ".join(map(str, values)), mean * n
    listed = ", ".join(map(str, values))
    return (
        Exercise(
            f"Find the mean of {listed}.",
            [f"Their sum is {row} = {total}.", f"There are {n} values: {total} / {n} = {mean}."],
            str(mean),
        ),
        Exercise(
            f"다음 값의 평균을 구하십시오: {listed}",
            [f"합은 {row} = {total}입니다.", f"값이 {n}개이므로 {total} / {n} = {mean}입니다."],
            str(mean),
        ),
    )  # fmt: skip


def dice(r: random.Random) -> Pair:
    target = r.randint(2, 12)
    ways = [(i, target - i) for i in range(1, 7) if 1 <= target - i <= 6]
    chance = Fraction(len(ways), 36)
    listed = ", ".join(f"({i}, {j})" for i, j in ways)
    return (
        Exercise(
            f"Two fair dice are rolled. What is the probability that the sum is {target}?",
            [
                "There are 6 × 6 = 36 equally likely outcomes.",
                f"Those with sum {target} are {listed}: {len(ways)} in all.",
            ],
            str(chance),
        ),
        Exercise(
            f"주사위 두 개를 던질 때 눈의 합이 {target}일 확률을 구하십시오.",
            ["모든 경우의 수는 6 × 6 = 36입니다.", f"합이 {target}인 경우는 {listed}이며 모두 {len(ways)}가지입니다."],
            str(chance),
        ),
    )


KINDS: list[Callable[[random.Random], Pair]] = [
    addition, multiplication, division, fractions, linear, quadratic, system, rectangle, pythagoras, gcd, primes,
    percent, sharing, journey, progression, average, dice,
]  # fmt: skip


def exercises(count: int, seed: int = 0) -> Iterator[dict]:
    """`count` worksheets of one to five exercises, alternating English and Korean, in the sample corpus's format."""
    r = random.Random(seed)
    for number in range(count):
        korean = number % 2
        question, solution, answer = ("문제", "풀이", "답") if korean else ("Question", "Solution", "Answer")
        parts = list[str]()
        for kind in r.sample(KINDS, r.randint(2, 5)):
            exercise = kind(r)[korean]
            parts.append(
                f"{question}: {exercise.question}\n{solution}: "
                + "\n".join(exercise.steps)
                + f"\n{answer}: {exercise.answer}"
            )
        yield {"text": "\n\n".join(parts), "source": f"generated/exercises-{seed}-{number}", "licence": "Apache-2.0"}
