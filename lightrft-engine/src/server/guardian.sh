# Runs a server (grace period in seconds, then its command line) and ends all of its process group when the
# lifeline does: standard input is a pipe that nobody writes to, and that ends when whoever holds the other end
# drops it or is killed. The shell is the group's leader, so that a signal to group 0 reaches every descendant
# that has not left the group, and nobody else.
grace=$1
shift
exec 3<&0 </dev/null
ended=
# Caught, not ignored: the server must not inherit the deafness.
trap 'ended=1' TERM INT HUP
(
    trap '' TERM INT HUP
    read -r _ <&3
    kill -s TERM 0
    while [ "$grace" -gt 0 ]; do
        sleep 1
        grace=$((grace - 1))
    done
    kill -s KILL 0
) &
guardian=$!
"$@" 3<&-
status=$?
# Descendants may have outlived the server. Where it was ended they go at once; where it ended by itself the guardian
# stays with them, until whoever holds the lifeline kills the group, or is gone.
if [ -n "$ended" ]; then
    kill -s KILL "$guardian"
    wait "$guardian" 2>/dev/null
    kill -s KILL 0
fi
exit "$status"
