r"""Equations that can be read in a text, checked exactly. A trace with a false one is never trained on.

Each `=` is an equation of what stands directly to its left and to its right: arithmetic on numbers, with units,
currency signs and percent, plain or in LaTeX. What cannot be read for certain (a variable, a power, a clock time) is
left unread rather than guessed. An equation that can honestly be read in several ways (`3 / 1/4 = 12`,
`$0.75 * 2 = 150 cents`, `$80 - 25% = $60`, `1.000 + 500 = 1.500 Euro`) is false only when it is false in all of them,
and one that is false in all of them is still left unread when there is a doubt about what it says (`doubts`).

In the order of their work: `plain` (LaTeX to plain lines), `units`, `lexing` (lines to tokens), `reading` (tokens to
values), `operands` (the two sides of an equals sign), `doubts` and `checking`.

The texts are hostile until shown otherwise: the patterns run in linear time, an operand has a bounded number of
tokens, a number a bounded number of digits and an equation a bounded number of readings.
"""

from __future__ import annotations

from slmreason.verify.equations.checking import Equation, equation_holds, evaluate, false_equations, read_equations
from slmreason.verify.equations.reading import MAX_TOKENS

__all__ = ["MAX_TOKENS", "Equation", "equation_holds", "evaluate", "false_equations", "read_equations"]
