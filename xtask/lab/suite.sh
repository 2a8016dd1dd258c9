#!/bin/sh
# The suite that runs inside the node: every test program given to it, one test at a time.
# Each test answers with a line PASS or FAIL; the exit code says whether all passed.
set -u
filter=$(cat /lab/filter)
echo "lab: $(uname -r), $(nproc) cpus, kvm $(test -c /dev/kvm && echo present || echo MISSING)"
bad=0
for program in /lab/tests/*; do
    [ -x "$program" ] || continue
    name=${program##*/}
    log=/out/$name.log
    { "$program" --test-threads=1 --nocapture $filter 2>&1; echo $? > /tmp/code; } | tee "$log"
    [ "$(cat /tmp/code)" = 0 ] || bad=1
    # What a test prints stands between its name and its result.
    awk -v program="$name" '
        /^test .+ \.\.\. / { test = $2 }
        /(^| )(ok|FAILED)$/ && test != "" {
            print ($NF == "ok" ? "PASS" : "FAIL"), program, test
            test = ""
        }' "$log"
done
exit $bad
