"""Equations in texts: which are read, which are true, and that no text takes long.

A text of NOT_FALSE is true in one of its readings or left unread: which of the two does not matter to who relies on it.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slmreason.verify.equations import MAX_TOKENS, equation_holds, evaluate, false_equations, read_equations

TRUE = [
    "48/2=24",
    "2 + 3 * 4 = 14",
    "(2 + 3) * 4 = 20",
    "5 - 8 = -3",
    "-18 / -2 = 9",
    "3 + 4 = 5 + 2 = 7",
    "12 = 3 * 4",
    "1,200 + 1 = 1,201",
    "80 000 x 20/100 = 16 000",
    "3x4 = 3 X 4 = 3×4 = 3 * 4 = 12",
    "(5)(3) = 5(2 + 1) = 15",
    "3 times 4 plus 2 = 14 and 360 divided by 5 = 72",
    "192*10=$1920",
    "$400 - $500 = $-100",
    "€400 / 100 = €4, which is more by 1 + 2 = 3.",
    "He paid $4.20 + $9.45 + $1.35 = $15.00.",
    "**5 + 3 = 8**",
    "- 5 * 3 = 15",
    "- 3 + 5 = 2",
    "1. 3 + 4 = 7",
    "(2) 3 + 4 = 7",
    "the total (5 + 3 = 8)",
    "| 5 + 3 = 8 |",
    # decimals are rounded
    "10 / 3 = 3.33",
    "3.3 = 10 / 3",
    "10 / 6 = 1.666...",
    "9/14*84 = 54.00000000000001",
    "80 / 26.666666666666668 = 3",
    # percent
    "1/2 = 50%",
    "1/3 = 33.3% = 33%",
    "20% * 80 = 16",
    "0.2 * 100 = 20%",
    "30/150 x 100% = 20%",
    "75 + 10% of 150 = 75 + 15 = 90",
    # mixed numbers, and fractions behind a slash
    "8 x 1 1/2 = 12",
    "12 x 1 and 1/4 = 15",
    "3 / 4 * 2 = 1 1/2",
    "3/ 1/4 = 12",
    "14 / 1 / 4 = 14 * 4 = 56",
    "3/3 - 2/3 = 1/3 of 150",
    # units
    "40 trees - 3 trees = 37 trees",
    "60 miles/hour * 2 hours = 120 miles",
    "10 pages per day on day 1 * 2 = 20 pages",
    "12 pieces of bread * 2 slices of ham per piece = 24",
    "90° - 30° = 60°",
    "$2.50 - $2.24 = 26 cents more",
    "2 hours + 30 minutes = 150 minutes",
    "5 thousand * 3 = $15,000",
    "He needs 3 apples - 4 * 2 = 8 pears.",
    # LaTeX
    r"\(\frac{48}{2} = 24\)",
    r"$\frac12 \times 60 = 30$",
    r"$5 \cdot 3$ = $15$",
    r"$-11+50 = 39$ and $-11+2\cdot 50 = \boxed{89}$.",
    r"1\frac{1}{2} \times 4 = 6",
    r"\frac{\frac{1}{2}}{3} = \frac{1}{6}",
    r"\left( 3 + 5 \right) \div 2 = \boxed{4}",
    r"20 \text{ apples} + 5 \text{ pears} = 25",
    r"1{,}000 + 1 = 1,\!001",
    r"\$5 \times 20\% = \$1",
    "\\begin{align*} 3 + 4 &= 7 \\\\\n 2 + 2 &= 4 \\end{align*}",
    "3 + 4\n  = 7",
]
FALSE = [
    "12 * 4 = 49",
    "10 / 3 = 3.34",
    "10 / 3 = 3",
    "0.5 - 0.4 = 0.09",
    "9/14*84 = 54.00100000000001",
    "2*3 = 6 + 1 = 7",
    "14 = 3 * 4",
    "192*100=$1920",
    "100 * 0.75 = $0.75",
    "1/2 = 51%",
    "25/75 x 100% = 25%",
    "75 + 10% of 150 = 75 + 16",
    "8 x 1 1/2 = 13",
    "500/ 2/5 = 200",
    "40 trees - 3 trees = 38 trees",
    "50 - 8 = 44 remaining",
    "$2.50 - $2.24 = 27 cents",
    "2 hours + 30 minutes = 140 minutes",
    "(5 + 3 = 9)",
    "- 5 * 3 = 16",
    "a total of 4+4+6 = 18 hot dogs",
    "14 trash cans on the streets + 28 trash cans = 43 trash cans",
    r"\(\frac{48}{2} = 25\)",
    r"\left( 3 + 5 \right) \div 2 = \boxed{5}",
    r"2+2=5 \boxed{5}",
    "3 + 4\n  = 8",
    "He had <<50-8=44>>42 left.",
    "5! is 120, and 3 + 4 = 8.",
    # units, percentages, numbers in every reading
    "2 hours + 15 min = 140 min",
    "2 hours + 30 minutes = 32 minutes",
    "2 hours + 30 minutes = 32",
    "5 feet 10 inches - 5 feet 4 inches = 7 inches",
    "$15/hr * 40 min = $11",
    "3 L + 500 mL = 3600 mL",
    "5 feet 6 inches + 2 inches = 69 inches",
    "2 kg - 500 g = 1400 g",
    "1 km + 500 m = 1600 m",
    "$2 + 50 cents = $52",
    "3 dozen eggs + 6 eggs = 40 eggs",
    "90 / 60 = 1 hour 40 minutes",
    "1/2 hour + 15 minutes = 50 minutes",
    "60 miles per hour * 30 minutes = 40 miles",
    "2 nickels + 3 dimes = 45 cents",
    "1.5 million + 500,000 = 3,000,000",
    "5 red apples + 3 green apples = 9 apples",
    "$80 - 25% = $55",
    "$200 * 10% = $2000",
    "100% - 25% = 70%",
    "1.000 + 500 = 1.600 Euro",
    "25 * 3 = 75,000",
    "5€ + 3€ = 9€",
    "11 / 5 = 5 (rounded up)",
    "3 * 4 = 13 apples and 5 + 2 = 7 pears",
    "x = 3, 2 x 4 = 9",
    "5-8 = 3",
]
NOT_FALSE = [
    # a number after a unit, and quantities in several units
    "150 / 60 = 2 hours 30 minutes",
    "45 minutes + 45 minutes = 1 hour 30 minutes",
    "90 / 60 = 1 hour, 30 minutes",
    "90 minutes / 60 = 1 hour 30 minutes",
    "1 hour 30 minutes + 45 minutes = 2 hours 15 minutes",
    "2 hours and 30 minutes - 45 minutes = 105 minutes",
    "5 ft 6 in + 2 in = 68 in",
    "3 lb 4 oz + 12 oz = 4 lb",
    "2 dollars and 50 cents + 50 cents = 3 dollars",
    "17 / 5 = 3 groups and 2 students",
    "5 / 2 = 2 and a half",
    "5 / 2 = 2 hours and a half",
    "9 / 2 = 4 and 1 left",
    "He has 5 boxes and 3 + 2 = 10 pens.",
    # units that convert
    "1 hr + 30 min = 90 min",
    "1 year + 6 months = 18 months",
    "1 meter + 50 cm = 150 cm",
    "1 m + 50 cm = 150 cm",
    "2 kg + 500 g = 2.5 kg",
    "3 lb + 4 oz = 52 oz",
    "2 pounds + 50 pence = 2.50 pounds",
    "5 feet + 6 inches = 5.5 feet",
    "2 cups + 4 tablespoons = 2.25 cups",
    "$2.50 + 50 cents = $3",
    "2 nickels + 3 dimes = 40 cents",
    "2 nickels + 3 dimes = 5 coins",
    "3 dozen + 6 = 42",
    "1 dozen + 3 eggs = 15 eggs",
    "1.5 million + 500 thousand = 2 million",
    "20 * 3 = 1 hour",
    "30 seconds * 4 = 2 minutes",
    "1/2 cup + 1/4 cup = 3/4 cup",
    "1/2 hour + 15 minutes = 45 minutes",
    "60 miles per hour * 30 minutes = 30 miles",
    "10 pages per day * 2 weeks = 140 pages",
    "3 yards * 2 feet = 18 square feet",
    "1 week 3 days + 4 days = 2 weeks",
    "60 mph * 30 minutes = 30 miles",
    "$15/hr * 40 min = $10",
    "1 ton + 500 kg = 1500 kg",
    "1 cup + 2 oz = 10 oz",
    "1 score + 5 = 25",
    r"$1\text{ hr} + 30\text{ min} = 90\text{ min}$",
    # units that nobody can convert
    "3 packs + 2 bottles = 20 bottles",
    "2 adults + 3 children = $50",
    "2 length + 2 width = 20",
    "1 year - 2 weeks = 50 weeks",
    "1 inch + 1 cm = 3.54 cm",
    "1 GB + 500 MB = 1500 MB",
    "1 hora + 30 minutos = 90 minutos",
    "25 March + 10 days = 4 April",
    "4 daps / 7 = 7 yaps / 7",
    # percentages of what stands before them
    "$80 - 25% = $60",
    "$60 = $80 - 25%",
    "20 + 10% = 22",
    "100 + 10% + 5% = 115.5",
    "100 + 10% + 5% = 115",
    "$80 - 25% discount = $60",
    "$50 * 20% off = $40",
    "100% - 25% = 75%",
    "80 - 25% of 80 = 60",
    "50% + 20% = 70",
    "50000/100 * 99% = 49500",
    # numbers as they are written in Europe, and currencies
    "1.000 + 500 = 1.500 Euro",
    "2.500 + 2.500 = 5.000",
    "1.250 kg * 4 = 5 kg",
    "0.125 * 8 = 1.000",
    "1.000 * 1.5 = 1.500",
    "1.234.567 + 1 = 1.234.568",
    "3,5 + 1,5 = 5",
    "5 € + 3 € = 8 €",
    "10 € - 3 * 2 = 4 €",
    "50¢ + 25¢ = 75¢",
    # about equal, rounded, asked
    "10/3 = ~3",
    "10/3 ~= 3",
    "10/3 ≈ 3",
    r"10/3 \approx 3",
    "11 / 5 = 2 full weeks",
    "11 / 5 = 3 (rounded up)",
    "Is 3 + 4 = 8?",
    # hyphens, colons, dates, clocks, code
    "10-15 minutes * 2 = 20-30 minutes",
    "1-1/2 cups + 1/2 cup = 2 cups",
    "8 : 4 + 1 = 3",
    "6 + 6 = 24 : 2",
    "3:2 = 6:4",
    "12/25/2020 - 12/20/2020 = 5 days",
    "2020-10-15 + 5 days = 2020-10-20",
    "9 + 5 = 2 o'clock",
    "8 a.m. - 6 * 1 = 2 a.m.",
    "0x10 + 1 = 17",
    "x += 3 + 4; y == 4 + 5; z != 3 + 1",
    "for i in range(3): total = 3",
    # functions in words
    "The square root of 16 + 9 = 5",
    "16 squared + 3 = 259",
    "sum of 3 and 4 * 2 = 14",
    "the average of 3 + 4 + 5 = 4",
    "4 pi - 6 = 6.57",
    "2ab + 3 = 10",
]
UNREAD = [
    "7 = 7",
    "1 / 0 = 1",
    "2x - 5 = 13",
    "x + 1 = 2",
    "26=5+3x\n21=3x",
    "30 + M = 3*30",
    "3*30 = 30 + M trees",
    "x2 + 3 = 4",
    "2^3 + 1 = 10",
    "5! + 3 = 8",
    "3 + 4 = 8!",
    "√16 + 3 = 20",
    "3sqrt(6) * 2 = 6",
    r"\frac{1}{3}Bh = \frac{1}{3}bh",
    r"279/99999 = 0.\overline{00279}",
    r"3 + 4 = 2 \pmod 5",
    "2 = 3 + 4 (mod 5)",
    "|x - 4| - 10 + 10 = 2 + 10",
    "13 / 6 = 2 full cycles with a remainder of 1 hour",
    r"\(54 \div 5 = 10\) remainder \(4\)",
    "0900-0130 = 0730",
    "10:30 + 1 = 11",
    "11am + 4 hours = 3pm",
    "16,0000/10=16000",
    "14, 400 / 80 = 180",
    "half of the 8 + 4 = 8",
    "add 2 to 3 * 4 = 20",
    "multiplying 2 by 3 + 4 = 10",
    "8 packs of 5 bags * $4 = $160",
    "Remaining 10 = 62,300/10",
    "8 batches = 5.5 * 8",
    "1/2 a cup = 4 ounces",
    "1/3 of Tom's cards + 4 = 26",
    "Week 1 + Week 2 = 70",
    "1st - 5 = 6th",
    "3 + 4 == 8, 3 + 4 => 8, 3 + 4 != 8",
    "1+" * MAX_TOKENS + "1 = 3",
    "1" * 50 + " + 1 = 3",
]


@pytest.mark.parametrize("text", TRUE)
def test_true_equations_hold(text: str) -> None:
    assert equation_holds(text) is True


@pytest.mark.parametrize("text", FALSE)
def test_false_equations_do_not(text: str) -> None:
    assert equation_holds(text) is False


@pytest.mark.parametrize("text", NOT_FALSE)
def test_what_is_true_in_some_reading_is_not_false(text: str) -> None:
    assert false_equations(text) == []


@pytest.mark.parametrize("text", UNREAD)
def test_what_cannot_be_read_for_certain_is_left_unread(text: str) -> None:
    assert read_equations(text) == []


def test_equations_are_read_from_prose_and_annotations() -> None:
    text = "He sold 48/2 = <<48/2=24>>24 clips. Then 24 + 48 = 73, and x + 1 = 2."
    assert [e.text for e in read_equations(text)] == ["48/2 = 24", "24 + 48 = 73", "48/2=24"]
    assert false_equations(text) == ["24 + 48 = 73"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("He sold 48/2 = 25 clips.", "48/2 is 24, not 25."),
        ("15 = 3 * 4", "3 * 4 is 12, not 15."),
        ("495 students * $15/student = $7455 in all", "495 students * $15 is 7425, not $7455."),
        ("10 / 3 = 3.5", "10 / 3 is about 3.33333, not 3.5."),
        ("833.33 * $1.50 = $1250", "833.33 * $1.50 is 1249.995, not $1250."),
        ("2*3 = 6 + 1", "2*3 is 6, not 6 + 1."),
        ("36 feet / 2/3 = 24 feet", "36 feet / 2/3 is not 24 feet."),
        (r"\frac{48}{2} = 25", "(48/2) is 24, not 25."),
        ("$80 - 25% = $55", "$80 - 25% is not $55."),  # 60 or 79.75
        ("2 hours + 15 min = 140 min", "2 hours + 15 min is not 140 min."),
    ],
)
def test_a_fault_says_what_is_true_instead(text: str, fault: str) -> None:
    assert [equation.fault for equation in read_equations(text)] == [fault]


def sums(depth: int) -> st.SearchStrategy[str]:
    """Random arithmetic, with brackets around every part that computes."""
    numbers = st.integers(0, 999).map(str) | st.decimals(0, 99, places=2).map(str)
    if depth == 0:
        return numbers
    inner = sums(depth - 1).map(lambda text: text if text.replace(".", "").isdigit() else f"({text})")
    return st.builds(
        lambda left, op, right: f"{left}{op}{right}", inner, st.sampled_from([" + ", "-", "*", " x ", " / "]), inner
    )


@given(sums(3), st.integers(-99, 99).filter(bool), st.sampled_from(["so {} = {}.", r"\[ {} = {} \]", "<<{}={}>>"]))
def test_random_true_equations_hold_and_disturbed_ones_do_not(expression: str, off: int, frame: str) -> None:
    value = evaluate(expression)
    assume(value is not None and len(str(value)) < 30 and any(op in expression for op in "+-*x/"))
    assert value is not None

    def stated(number: Fraction) -> str:
        return str(number) if number.denominator == 1 else f"{number.numerator}/{number.denominator}"

    assert equation_holds(frame.format(expression, stated(value))) is True
    assert equation_holds(frame.format(expression, stated(value + off))) is False


@given(st.integers(-99, 99), st.integers(1, 99), st.integers(1, 99))
def test_evaluate_is_exact(a: int, b: int, c: int) -> None:
    assert evaluate(f"({a} - {b}) / {c} * {b}") == Fraction(a - b, c) * b
    assert evaluate("__import__('os')") is None
    assert evaluate("5 apples") is None


@given(st.text(alphabet="0123456789 .,+-*/()=%$xa\\{}<>\nfrac", max_size=200))
def test_any_text_is_read(text: str) -> None:
    assert len(read_equations(text)) <= text.count("=")


N = 100_000


@pytest.mark.parametrize(
    "text",
    [
        "1" * N + " = 2",
        "1+" * (N // 2) + "1 = 3",
        "(" * N + "1" + ")" * N + " = 2",
        "-" * N + "1 = 2",
        "1+1=" * (N // 4),
        "0/0=" * (N // 4),
        r"\frac{" * (N // 6),
        r"\frac{1}{" * (N // 9) + "2" + "}" * (N // 9) + " = 1",
        r"\text{" * (N // 6),
        "<<1=2" * (N // 5),
        " " * N + "1 = 2",
        "\n" * N + "= 2",
        "^" + " " * N,
        "1 1/" + "1" * N + ".5",
        "111 " * (N // 4) + "1 = 3",
        "a - 1 " * (N // 6) + "= 3",
        ("a - 1/7 " * 15 + "= 2% of 3 of 4 of 5 of 6/11 hours ; ") * (N // 160),
        ("*".join(["9" * 40] * 31) + " = 1; ") * (N // 1300),
        ("1.5% / 2 / 3 pounds per hour - " * 6 + "2% = 1.500 + 3% of 5/6/7 pounds per hour; ") * (N // 230),
        ("7 - 5% a pound - " * 8 + "2% = 3% of 4 of 5 of 6 pounds; ") * (N // 170),
        "1 pound 2 ounces " * (N // 17) + "= 3 + 4 hours",
        "sum and " * (N // 8) + "3 + 4 = 8",
        "3 + 4 = 8 and " * (N // 14),
    ],
    ids=lambda text: text[:12].strip() or repr(text[0]),
)
@pytest.mark.timeout(120)  # a few seconds on a free core; what is not linear would take many minutes
def test_hostile_texts_are_read_to_their_end(text: str) -> None:
    read_equations(text)
