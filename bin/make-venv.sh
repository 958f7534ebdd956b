#!/bin/sh
# Makes .venv, or completes what an earlier try left of it, and installs requirement files into it.
#
#     make-venv.sh "3.13 3.12 3.11" PYTHON req.txt...    the versions that fit; the Python to take, or '' for the newest
#
# A failure is one line: what, where, what to do. All that pip said is in .venv/install.log.
# This is POSIX sh because it runs before there is a Python to rely on.
set -u

VERSIONS=$1
PYTHON=$2
shift 2
VENV=.venv
LOG=$VENV/install.log
terminal=''
if [ -t 1 ]; then terminal=yes; fi

fail() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# "3.12", for a Python that runs: version managers leave commands on the PATH that exist and do not run.
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

fits() { case " $VERSIONS " in *" $1 "*) ;; *) return 1 ;; esac }

words_for_disk() {
	echo "no space left for $PWD/$VENV, or for temporary files in ${TMPDIR:-/tmp}: with the CUDA build of torch $VENV" \
		"takes 7 GB, without 3 (req.txt says how). Make room, then run make again"
}

# ---------------------------------------------------------------------------------------------- the environment

# Can what is there be completed? Not if its Python is gone, has no pip, or is another than the one asked for.
usable() {
	have=$(version "$VENV/bin/python") && fits "$have" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 &&
		{ [ -z "$PYTHON" ] || [ "$(version "$PYTHON")" = "$have" ]; }
}

# In two steps, because `python -m venv` alone does not say why ensurepip failed.
create() {
	"$1" -c 'import venv, ensurepip' || return
	rm -rf "$VENV"
	"$1" -m venv --without-pip "$VENV" && "$VENV/bin/python" -Im ensurepip --upgrade --default-pip && return
	rm -rf "$VENV"
	return 1
}

words_for_create() { # python, version, what it said
	case $3 in
	*"No module named "*venv* | *"No module named "*ensurepip*)
		todo="install a complete Python $2"
		if command -v apt-get >/dev/null; then todo="sudo apt install python$2-venv"; fi
		echo "$1 (Python $2) cannot make $PWD/$VENV, for its module venv or ensurepip is missing: $todo, then run make" \
			"again" ;;
	*"No space left"* | *"Disk quota exceeded"*) words_for_disk ;;
	*) echo "$1 (Python $2) cannot make $PWD/$VENV: $(printf '%s\n' "$3" | tail -n 1)" ;;
	esac
}

make_venv() {
	if [ -n "$PYTHON" ]; then set -- "$PYTHON"; else set -- $(printf 'python%s ' $VERSIONS) python3; fi
	seen='' problem=''
	for python; do
		if ! command -v "$python" >/dev/null; then
			if [ -n "$PYTHON" ]; then seen="$python does not exist"; fi
		elif ! have=$(version "$python"); then
			seen="${seen:+$seen, }$python does not run"
		elif ! fits "$have"; then
			seen="${seen:+$seen, }$python is Python $have"
		else
			echo "Making $VENV with $python (Python $have)."
			if said=$(create "$python" 2>&1); then return; fi
			problem=${problem:-$(words_for_create "$python" "$have" "$said")}
		fi
	done
	[ -z "$problem" ] || fail "$problem"
	wanted=$(echo "$VERSIONS" | sed 's/ /, /g; s/\(.*\),/\1 or/')
	fail "$VENV needs Python $wanted, and ${seen:-there is none on the PATH}: install one, or say where it is:" \
		"make PYTHON=/path/to/python3.12 ..."
}

# pip takes a package in which it was interrupted for a complete one, though commands may be missing. It signs, in the
# file INSTALLER, when all else is there.
forget_halves() {
	for package in "$VENV"/lib/python*/site-packages/*.dist-info; do
		if [ -d "$package" ] && [ ! -e "$package/INSTALLER" ]; then rm -rf "$package"; fi
	done
	rm -rf "$VENV"/lib/python*/site-packages/~*
}

# ---------------------------------------------------------------------------------------------- the packages

# The index that pip asks: only pip knows it (settings, environment, its own default), and its help hides passwords.
index() {
	COLUMNS=1000 "$VENV/bin/python" -m pip install --help |
		sed -n 's/.*--index-url.*(default \([^)]*\)).*/\1/p'
}

host_of() { printf '%s\n' "$1" | sed 's#^[^/]*//##; s#^[^/]*@##; s#/.*##'; }

# "HTTPS_PROXY=host:port": the proxy that pip would take to a URL, without user and password; nothing if there is none.
proxy_to() {
	own=$("$VENV/bin/python" -m pip config list | sed -n "s/.*\.proxy='\(.*\)'/\1/p" | tail -n 1)
	"$VENV/bin/python" -c '
import os, sys, urllib.parse, urllib.request
url, own = urllib.parse.urlsplit(sys.argv[1]), sys.argv[2]
kinds = [] if urllib.request.proxy_bypass(url.hostname) else [url.scheme, "all"]
names = [name for kind in kinds for name in (kind + "_proxy", kind.upper() + "_PROXY")]
found = [("PIP_PROXY" if os.environ.get("PIP_PROXY") else "the settings of pip", own)]
found += [(name, os.environ.get(name)) for name in names]
found += [("the settings of the system", urllib.request.getproxies().get(kind)) for kind in kinds]
for name, value in [pair for pair in found if pair[1]][:1]:
    print(name + "=" + value.rpartition("//")[2].rpartition("@")[2].strip("/"))
' "$1" "$own" 2>/dev/null
}

# pip names an index that it could not read only when it talks a lot, or when it tried again (PIP_RETRIES).
look_again() {
	"$VENV/bin/python" -m pip install --disable-pip-version-check --no-input -vv --dry-run --no-deps "$1" >>"$LOG" 2>&1
	notice "$(grep "Could not fetch URL " "$LOG" | tail -n 1)"
}

# Why pip failed, from what `notice` saw.
words_for_pip() {
	if [ -n "$missing" ] && [ -z "$offered$unreached$distrusted" ]; then look_again "$missing"; fi
	index=$(index)
	asked=$(host_of "$index")
	if [ -n "$full" ]; then
		words_for_disk
	elif [ -n "$distrusted" ]; then
		echo "the certificate of the package index at $asked is not trusted here, as happens behind a proxy that reads" \
			"along: set PIP_CERT=/path/to/its/certificates.pem, then run make again"
	elif [ -n "$refused" ]; then
		echo "the package index at $asked refused ($refused): correct what PIP_INDEX_URL or pip's settings say of it, with" \
			"its user and password, or of the proxy; then run make again"
	elif [ -n "$unreached" ] && [ -z "$offered" ]; then
		case $asked in "$host":*) host=$asked ;; esac
		proxy=$(proxy_to "$index")
		if [ -n "$proxy" ]; then
			echo "cannot reach the package index at $asked through the proxy ${proxy#*=} of ${proxy%%=*}${reason:+ ($reason)}:" \
				"correct or unset that, or, for pip alone, set PIP_PROXY=http://USER:PASSWORD@HOST:PORT (its --proxy);" \
				"then run make again"
		else
			echo "cannot reach the package index at ${host:-$asked}${reason:+ ($reason)}: connect to the network or, behind a" \
				"proxy, set HTTPS_PROXY=http://HOST:PORT (or, for pip alone, PIP_PROXY, its --proxy); then run make again"
		fi
	elif [ -n "$missing" ]; then
		echo "the package index at $asked has no $missing for Python $(version "$VENV/bin/python") on $(uname -sm):" \
			"try another Python (make PYTHON=python3.12 ...) or another index (PIP_INDEX_URL=...)"
	else
		echo "pip could not install $files: ${last:-it ended with $status}" | sed 's/\.$//'
	fi
}

# What a line of pip's tells about a failure. Several lines, of several releases of pip, may be about the same one.
notice() {
	case $1 in *"host='"*) host=${1#*host=\'} host=${host%%\'*} ;; esac
	case $1 in ERROR:* | error:* | "× "*) last=${1#ERROR: } ;; esac
	case $1 in
	*"No space left on device"* | *"Disk quota exceeded"*) full=yes ;;
	*CERTIFICATE_VERIFY_FAILED* | *"doesn't match either of"*) distrusted=yes ;;
	*"SOCKS support"*) unreached=yes reason="no PySocks, which pip needs for SOCKS" ;;
	*"Tunnel connection failed: "*) unreached=yes reason=${1##*Tunnel connection failed: } ;;
	*"Could not fetch URL "*" 404 Client Error: "*) ;;
	*"Could not fetch URL "*" Client Error: "*) refused=${1#*/: } refused=${refused%% for url*} ;;
	*"connection broken by"*"[Errno "* | *"Could not fetch URL "*"[Errno "*)
		unreached=yes reason=${1##*\[Errno } reason=${reason#*\] } ;;
	*"connection broken by"* | *"ConnectionPool(host="* | *"onnection broken: "* | *"not enough bytes"*) unreached=yes ;;
	*"(from versions: none)"*) ;;
	*"(from versions: "*) offered=yes ;;
	*"No matching distribution found for "*) missing=${1##* } ;;
	"Collecting "* | *"Downloading "*) unreached='' ;; # it answers again
	esac
	reason=${reason%%[\'\"\)]*}
}

# Where pip is: one line, written anew each second, on a terminal; elsewhere a line for each step that takes long.
show() { # the step, and whether it takes long
	step=$1
	if [ -n "$terminal" ]; then
		printf '\r\033[K  %d:%02d  %s' $((seconds / 60)) $((seconds % 60)) "$step"
	elif [ -n "$2" ]; then
		printf '  %s\n' "$step"
	fi
}

progress() { # a line of pip's
	case $1 in
	"Collecting "*)
		name=${1#Collecting }
		show "looking up ${name%% *}" '' ;;
	*"Downloading "*.metadata*) ;;
	*"Downloading "*" ("*)
		name=${1#*Downloading } size=${1##*(} big=''
		case $size in [0-9][0-9]*MB* | *GB*) big=yes ;; esac
		show "downloading ${name%%-*} ($size" "$big" ;;
	*"Retrying (Retry("*) if [ -z "$unreached" ]; then show "the package index does not answer; trying again" yes; fi ;;
	"Installing collected packages: "*) show "installing packages: $(echo "$1" | tr , "\n" | grep -c .)" yes ;;
	esac
}

# Keeps what pip says, shows where it is, and ends with one line if it failed.
follow() {
	seconds=0 step='asking the package index' status=''
	full='' distrusted='' refused='' unreached='' offered='' missing='' host='' reason='' last=''
	while IFS= read -r line; do
		case $line in
		tick) seconds=$((seconds + 1)) && show "$step" '' ;;
		"pip ended with "*) status=${line##* } && break ;;
		*)
			case $line in *//*@*) line=$(printf '%s\n' "$line" | sed 's#//[^/@ ]*@#//#g') ;; esac # passwords
			printf '%s\n' "$line" 2>/dev/null >&3
			progress "$line"
			notice "$line" ;;
		esac
	done
	if [ -n "$terminal" ]; then printf '\r\033[K'; fi
	case $status in
	0) ;;
	'') exit 130 ;; # interrupted; make says so
	*) fail "$(words_for_pip). All of pip's output: $PWD/$LOG" ;;
	esac
}

install() {
	files=$*
	for file; do
		set -- "$@" --requirement "$file"
		shift
	done
	echo "Installing $files into $VENV; the downloads take some minutes."
	{
		# Something moves on a terminal while pip is silent.
		if [ -n "$terminal" ]; then while sleep 1; do echo tick; done & fi
		"$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@"
		echo "pip ended with $?"
		if [ -n "$terminal" ]; then kill $!; fi
	} 2>&1 | follow 3>"$LOG"
}

usable || make_venv
forget_halves
install "$@"
