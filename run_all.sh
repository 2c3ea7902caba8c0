#!/usr/bin/env bash
# A whole run on this machine, from a fresh clone on: installs, then calls `yaongi run JOB OPTION...`.
#
#   ./run_all.sh [JOB [OPTION...]]      JOB: a preset or a file (default: h100-4b-interleaved)
#
# It asks nothing, so it can be the start command of a rented machine. A second call goes on where the first was, in the
# installation as in the run. SIGTERM, SIGINT and SIGHUP reach the run, which saves a checkpoint; its exit code is this
# script's (docs/exit-codes.md). Data and checkpoints are in work/ beside this script, unless OPTION has --workdir; all
# output is also in a file beside that folder, work.log.
#
# Keys such as HF_TOKEN come from the file .env beside this script (see .env.example); what the environment already has
# takes precedence. They are handed on in the environment alone and never printed.
set -euo pipefail
{ set +x; } 2>/dev/null # a trace would print keys
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { # CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

malformed() { # FILE NUMBER WHAT
    fail 2 "$1 line $2: $3; write NAME=VALUE, or NAME='VALUE' for spaces and #"
}

read_env() { # FILE: exports its variables
    local file=$1 line number=0 name value quote rest
    [ -r "$file" ] || fail 74 "$file cannot be read by this user; chmod u+r it or remove it"
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        [ "$number" != 1 ] || line=${line#$'\xef\xbb\xbf'} # the mark with which editors of Windows begin
        line=${line%$'\r'}
        line=$(trimmed "$line")
        case $line in '' | '#'*) continue ;; esac
        [[ ! $line =~ ^export[[:blank:]]+(.*)$ ]] || line=${BASH_REMATCH[1]}
        # No message repeats any of the line, which may be a key alone.
        [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || malformed "$file" "$number" "no NAME= at its beginning"
        name=${BASH_REMATCH[1]} value=$(trimmed "${BASH_REMATCH[2]}") quote=${value:0:1}
        if [ "$quote" = "'" ] || [ "$quote" = '"' ]; then
            rest=${value:1}
            value=${rest%%"$quote"*}
            [[ $rest == *"$quote"* && $(trimmed "${rest#*"$quote"}") =~ ^(#.*)?$ ]] ||
                malformed "$file" "$number" "its quotes do not enclose the value"
        else
            [[ ! $value =~ (^|[[:blank:]])#.*$ ]] || value=$(trimmed "${value%"${BASH_REMATCH[0]}"}")
            [[ ! $value =~ [[:blank:]] ]] || malformed "$file" "$number" "a space in the value"
        fi
        (unset -v "$name") 2>/dev/null || fail 2 "$file line $number: a shell does not let $name be set; remove the line"
        [ -z "$value" ] || [ -n "${!name:-}" ] || export "$name=$value"
    done <"$file"
}

trimmed() {
    local text=$1
    text=${text#"${text%%[![:space:]]*}"}
    printf %s "${text%"${text##*[![:space:]]}"}"
}

require_writable() { # FOLDER FIX
    mkdir -p "$1" 2>/dev/null && [ -w "$1" ] || fail 74 "$1 cannot be written by user $(id -u); $2"
}

has_python() {
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

job=h100-4b-interleaved
case ${1:-} in '' | -*) ;; *) job=$1 && shift ;; esac
workdir='' previous=''
for option in "$@"; do
    case $option in --workdir=*) workdir=${option#*=} ;; esac
    [ "$previous" != --workdir ] || workdir=$option
    previous=$option
done
[ -n "$workdir" ] || { workdir=$root/work && set -- "$@" --workdir "$workdir"; }

[ ! -e "$root/.env" ] || read_env "$root/.env"
[ -x "$root/.venv/bin/yaongi" ] || require_writable "$root" "clone into a folder of your own, or change its owner with chown"
require_writable "$(dirname "$workdir")" "give another folder: --workdir FOLDER"
log=${workdir%/}.log
{ : >>"$log"; } 2>/dev/null || fail 74 "$log cannot be written by user $(id -u); remove it, or give another --workdir"
[ -x "$root/.venv/bin/python" ] || has_python ||
    fail 69 "${PYTHON:-python3} is not Python 3.11 or newer; install one (apt install python3.11-venv) or name it: PYTHON=python3.12 $0"
command -v make >/dev/null || fail 69 "make is not installed; install it: apt install make"

# From here on everything is also in the log. A signal to the whole group must not end what writes it.
exec 3>&1 4>&2 </dev/null > >(trap '' INT TERM HUP && exec tee -a "$log") 2>&1
logger=$!
finish() { # CODE: when the log is complete
    exec 1>&3 2>&4
    wait "$logger" || true
    exit "$1"
}

child='' received=''
forward() { # SIGNAL
    received=$1
    [ -z "$child" ] || kill -s "$1" -- "-$child" 2>/dev/null || true
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

passed_on() { # COMMAND...: in a process group of its own, which gets each signal once; returns its exit code
    local code=0
    set -m
    "$@" &
    child=$!
    set +m
    while :; do
        received=''
        code=0
        wait "$child" || code=$?
        [ -n "$received" ] || break # else the signal ended `wait`, not the command
    done
    child=''
    return "$code"
}

echo "$(date -u +%FT%TZ) $0: yaongi run $job; log $log"
code=0
passed_on make --no-print-directory -C "$root" setup || code=$?
if [ "$code" != 0 ]; then
    echo "error: the installation ended with $code, see above; call $0 again: it goes on where it was"
    [ "$code" -gt 128 ] || code=69
    finish "$code"
fi
code=0
passed_on "$root/.venv/bin/yaongi" run "$job" "$@" || code=$?
echo "$(date -u +%FT%TZ) $0: yaongi run ended with exit code $code"
finish "$code"
