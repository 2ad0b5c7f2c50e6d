#!/usr/bin/env bash
# What a newcomer does first, on a plain install: my files, my model, my reward, one command; stopped and gone on with;
# a report; a few lines of Python; three mistakes. Neither a network nor a GPU is needed.
#
#   tests/recipes/newcomer.sh [FOLDER]
#
# FOLDER is empty; without one it all happens in a new folder, which is removed. `slmreason` must be on the PATH.
set -euo pipefail
if [ $# -eq 0 ]; then
  set -- "$(mktemp -d)"
  trap 'cd / && rm -rf "$1"' EXIT
fi
cd "$1"
export HF_HUB_OFFLINE=1

fail() {
  echo "newcomer: $what: $1" >&2
  echo "newcomer: the end of its output:" >&2
  tail -n 40 out.txt | sed 's/^/    /' >&2
  exit 1
}

does() {  # does WHAT STATUS COMMAND...: runs a command, which must end with the status; its output is in out.txt
  local wanted=$2 status=0
  what=$1
  shift 2
  "$@" > out.txt 2>&1 || status=$?
  [ "$status" -eq "$wanted" ] || fail "status $status in place of $wanted"
}

says() {  # says WORDS...: each of them stands in the output of the last command
  local words
  for words in "$@"; do
    grep -qF -e "$words" out.txt || fail "nowhere in the output: $words"
  done
}

one_line() {  # the last command said what is wrong in one line
  [ "$(wc -l < out.txt)" -eq 1 ] || fail "$(wc -l < out.txt) lines in place of one"
}

# -- my files ---------------------------------------------------------------------------------------------------------

does "writing the files" 0 python - <<'PYTHON'
import csv
import json


def asked(n):
    return f"Ann has {n} pens and buys {n + 3} more. How many pens has she now?"


def worked(n):
    return f"{n} + {n + 3} = {2 * n + 3}\nThe answer is \\boxed{{{2 * n + 3}}}."


with open("chat.jsonl", "w") as file:
    for n in range(2, 34):
        turns = [{"role": "user", "content": asked(n)}, {"role": "assistant", "content": worked(n)}]
        file.write(json.dumps({"messages": turns}) + "\n")
with open("test.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["question", "answer"])
    rows.writerows([asked(n), 2 * n + 3] for n in range(40, 48))
with open("sharegpt.json", "w") as file:
    turns = lambda n: [{"from": "human", "value": asked(n)}, {"from": "gpt", "value": worked(n)}]
    json.dump([{"conversations": turns(n)} for n in range(50, 60)], file)
with open("rewards.py", "w") as file:
    file.write('''"""A reward with the signature of TRL's GRPOTrainer."""


def brevity(completions, completion_ids, **kwargs):
    """Shorter is better."""
    return [-float(len(ids)) for ids in completion_ids]
''')
with open("three_lines.py", "w") as file:
    file.write('''import slmreason

result = slmreason.fit(
    "quickstart", data={"train": "chat.jsonl", "limit": 8}, benchmarks=["test.csv"], run_dir="runs/from-python",
    curriculum={"rounds": 1, "stages": ["sft"], "probe": {"attempts": 2}}, sft={"epochs": 1},
)
print(result.table)
print(sum(p.numel() for p in result.student.parameters()), "parameters in", result.folder)
''')
PYTHON

does "data of a chat file" 0 slmreason data chat.jsonl
says "question: Ann has 2 pens and buys 5 more." "gold: 7" "trace, " "prompt, " \
  "chat.jsonl: 32 of 32 rows are problems, 0 are rejected"
does "data of a CSV file" 0 slmreason data test.csv
says "question: Ann has 40 pens" "gold: 83" "test.csv: 8 of 8 rows are problems"
does "data of a ShareGPT file" 0 slmreason data sharegpt.json
says "question: Ann has 50 pens" "gold: 103" "sharegpt.json: 10 of 10 rows are problems"

# -- one command, stopped from the keyboard -----------------------------------------------------------------------------

what="fit, stopped midway"
# The signal is heard even where this script runs in the background of a shell, which has its children ignore it.
python -c 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])' \
  slmreason fit --config quickstart --student.model embedded:qwen2 --data.train chat.jsonl --benchmarks '[test.csv]' \
  --reward '[AnswerReward, {fn: "rewards.py:brevity", weight: 0.01}]' --run_dir runs/mine --curriculum.rounds 1 \
  --curriculum.probe.attempts 4 --grpo.group_size 4 --grpo.prompts_per_step 8 > out.txt 2>&1 &
fit=$!
for _ in $(seq 1200); do
  if grep -q '^base: done' out.txt; then break; fi
  kill -0 "$fit" 2> /dev/null || fail "it ended before it could be stopped"
  sleep 0.1
done
grep -q '^base: done' out.txt || fail "the base was not measured within two minutes"
kill -INT "$fit"
status=0
wait "$fit" || status=$?
[ "$status" -eq 130 ] || fail "status $status in place of 130"
says "pool: 32 problems from chat.jsonl, 0 rejected" "stopped from the keyboard; what has been done is kept, go on with: "
goes_on=$(sed -n 's/^stopped from the keyboard; .* go on with: //p' out.txt)

does "the command that the stopped run printed: $goes_on" 0 bash -c "$goes_on"
says "going on " "run folder: runs/mine" "greedy pass@1" "next: "
[ -d runs/mine/student ] || fail "no student in runs/mine"
[ ! -e runs/mine-2 ] || fail "another run was begun"
[ "$(grep -c '"stage": ' runs/mine/summary.json)" -eq 4 ] || fail "summary.json has not base, sft, grpo and cft"

does "report" 0 slmreason report runs/mine
says "report: "
[ -s "$(sed -n 's/^report: //p' out.txt)" ] || fail "no page where it says that one is"

# -- from Python, and mistakes ------------------------------------------------------------------------------------------

does "slmreason.fit" 0 python three_lines.py
says "greedy pass@1" "round 1 sft" "parameters in runs/from-python"

does "a misspelt key" 2 slmreason fit --config quickstart --grpo.group_sise 4
says "--grpo.group_sise" "did you mean: grpo.group_size"
one_line
does "a value that a key does not take" 2 slmreason fit --config quickstart --curriculum.max_tokens many
says "error: curriculum.max_tokens: takes a whole number, or null"
one_line
does "a misspelt recipe" 2 slmreason fit --config quikstart
says "did you mean quickstart?"
one_line

echo "newcomer: all is as it should be"
