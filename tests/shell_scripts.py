"""Small scripts with the constructions of those that start trainings, and what bash itself makes of them."""

import random
import subprocess
from pathlib import Path

TRAINER = """\
mpirun -np 4 python pretrain_gpt.py "${ARGS[@]}" $MORE
"""

CONSTRUCTIONS = {
    "quotes": r"""ARGS=(--a 'one $TWO' "three \"four\" \$5" --b a\ b "" $'tab\there' --c "x"'y'z)""",
    "defaults": """SET=1 EMPTY=
ARGS=(--a ${SET:-2} ${unset:-"two words"} ${EMPTY:-e} "${EMPTY-kept}" ${unset+no}${SET:+yes} ${given:=5} $given)""",
    "splitting": """WORDS=" one  two three "
ARGS=(--a $WORDS "$WORDS" x${WORDS}y ${WORDS% *} "${WORDS}"z)
MORE=$WORDS""",
    "arrays": """A=(1 "2 3" 4)
A+=(5)
A[4]=7
A[0]+=x
declare -A M=([k]=v [l]="w x")
ARGS=(--a "${A[@]}" --b ${A[@]} --c "${A[*]}" --n ${#A[@]} --i "${A[1]}" --s "${A[@]:1:2}" --m "${M[l]}" "${A[-1]}")""",
    "arithmetic": """N=8 P=2
((N += 2)); ((i = N++ * 2))
ARGS=(--a $((N / (P * 2))) $(( N % 3 )) $((2 ** 10)) $((N > 3 && P < 2)) $((N ? 7 : 9))
  $((0x10 + 010)) $((-7 / 2)) $i $N)
let "N = N * 3"; MORE="$N $((1 << 4 | 1)) $((~5))" """,
    "trimming": """F=/data/ja/wiki_text_document.idx
B=$(basename "$F")
ARGS=(${F##*/} ${F%/*} ${F#*/} ${F%%/*}x ${B%_text_document.idx} ${F//a/A} ${F/ja/en} ${F/#\\/data/d} ${F/%idx/bin}
  ${#F} ${F:1:4} ${F: -3} ${B^^} ${B^} ${F/text} $(dirname $F) "$(basename $F .idx)")""",
    "loops": """for i in 1 2 {3..5} {a,b}c; do ARGS+=(--f$i); done
for ((i = 0; i < 3; i++)); do [ $i -eq 1 ] && continue; ARGS+=($i); done
n=0; while [ $n -lt 10 ]; do n=$((n + 1)); if [[ $n == 4 ]]; then break; fi; ARGS+=("w$n"); done
until (( n > 6 )); do ((n++)); done; MORE=$n
while read -r weight path; do ARGS+=("$weight:$path"); done <<< "1 a
2 b c"
for x in $(seq 2 2 6); do ARGS+=($x); done""",
    "conditions": """X=abc
if [[ $X == a* && ! -n "" ]]; then ARGS+=(1); else ARGS+=(2); fi
if [ "$X" = "abd" ] || test 3 -gt 2; then ARGS+=(3); fi
[[ $X =~ ^a.c$ ]] && ARGS+=(4)
[[ $X != *d && ( $X < b || $X == z ) ]] && ARGS+=(5)
case $X in x|y) ARGS+=(6) ;; a?c) ARGS+=(7) ;; *) ARGS+=(8) ;; esac
[ -z "$unset" ] && ARGS+=(9) || ARGS+=(10)
if false; then :; elif ! true; then :; elif (( 2 > 1 )); then ARGS+=(11); fi
[[ -z $unset || -n $unset ]] && ARGS+=(12)""",
    "functions": """add() { local value=$1; shift; ARGS+=("--$value" "$@"); }
function twice { add "$1" "$2 $2"; return 0; add never; }
add one 1 2
twice two 'x y'
first() { echo "printed $1"; }
MORE=$(first here; echo and `echo there`)""",
    "continued lines": """ARGS=(
  --a 1  # a comment with 'a quote
  # --gone 2
  --b \\
  2
)
MORE="--c \\
3 "--d" 4" """,
    "here-documents": """T=5
ARGS=($(cat <<EOF
--a $T $((T + 1))
EOF
) $(cat <<'EOF'
$T
EOF
))
MORE=$(cat <<-E | wc -l
	one
	two
	E
)""",
    "evaluated": """CMD="ARGS=(--a 'b c')"
eval "$CMD"
eval ARGS+=\\( --d \\)
set -- x "y z"
MORE="$# $1 $2"
ARGS+=("$@")
NAME=T T=indirect
MORE="$MORE ${!NAME}"
printf -v P '%s-%03d' a 7
ARGS+=($P "$(printf '%s,' 1 2)")""",
    "programs": """ARGS=($(echo "a b c" | awk '{print $2}') $(echo a:b:c | cut -d: -f3) $(echo "x,y" | tr ',' ' ')
  $(printf '3\\n1\\n3\\n' | sort -u | head -n 1) $(awk "BEGIN {print int(7 / 2 + 0.5)}")
  $(awk 'BEGIN { print 1 / 8; }'))""",
    "weights": """DATA=""
DATA="${DATA} 845605789 /data/a_text_document"
DATA="${DATA} 30221726.23 /data/b_text_document"
ARGS=(--data-path ${DATA} --lr 2.5E-5)""",
    "groups": """{ ARGS+=(1); X=in; }
( ARGS+=(2); X=sub )
ARGS+=($X)
echo a | { read v; ARGS+=("not here $v"); }
true && { ARGS+=(3); } || { ARGS+=(4); }""",
}


def by_bash(script: str, folder: Path) -> list[str]:
    """The words that bash gives to mpirun, which prints them here; only for scripts of this file."""
    bash = ["bash", "-c", 'mpirun() { printf "%s\\0" "$@"; }; . "$0"', str(folder / "script.sh")]
    (folder / "script.sh").write_text(script, encoding="utf-8")
    done = subprocess.run(bash, capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.split("\0")[:-1]


_NAMES = ("A", "B", "C", "ARR[0]", "ARR[1]", "U")  # U is not set
_OPERATIONS = (
    "", ":-d", "-d e", ":+alt", "+al t", ':-"q r"', "%b*", "%%/*", "#a", "##*/", "/a/X", "//a/X y", "^^", ",,", ":1",
    "::2",
)  # fmt: skip
_PLAIN = ("abc", "/p/q", "--o=1", "1e-5", "a,b", "'s q'", "'$A'", "\\ ", "\\$", '\\"', "$*", '"$@"', "{x,y}z", "$#")
_SUMS = ("N", "N*2", "N/2", "-N%3", "(N+1)<<2", "N>3?1:2", "N==7", "!N", "N**2", "++N", "N--")


def random_words(seed: int) -> str:
    """Four words of any quotes and expansions, after the variables that they name."""
    dice = random.Random(seed)
    pick = dice.choice
    values = pick(["abc", '"a b  c"', '" lead"', "a/b/abc", '"trail "', "'a*b'"]), pick(["b", '"x y"', "aXb"])
    head = f"A={values[0]} B={values[1]} C= N={pick(['7', '0', '12'])} ARR=(abc 'd e' a)\nset -f; set -- p 'q r'\n"

    def part() -> str:
        expansion = f"${{{pick(_NAMES)}{pick(_OPERATIONS)}}}"
        array = f"${{ARR[@]{pick(['', '/a/Z', ':1', '#a', '%c'])}}}"
        length = f"${{#{pick(['A', 'ARR[@]', 'U'])}}}"
        return pick([pick(_PLAIN), expansion, f'"{expansion}"', array, f'"{array}"', length, f"$(({pick(_SUMS)}))",
                     '"${ARR[*]}"', f'$(echo "$A" {pick("AB")})', "$B", '"$A$(echo "$B")"'])  # fmt: skip

    words = ["".join(part() for _ in range(dice.randrange(1, 4))) for _ in range(4)]
    return f"{head}rec {' '.join(words)}\n"


def by_bash_each(scripts: list[str], folder: Path) -> list[list[str]]:
    """The words that bash gives to `rec` in each of many scripts, by one bash."""
    apart = "".join(f"(\n{script})\nprintf '\\1\\0'\n" for script in scripts)
    (folder / "all.sh").write_text(f"rec() {{ printf '%s\\0' \"$@\"; }}\n{apart}", encoding="utf-8")
    done = subprocess.run(["bash", str(folder / "all.sh")], capture_output=True, text=True, check=True)
    return [part.split("\0")[:-1] for part in done.stdout.split("\1\0")[:-1]]
