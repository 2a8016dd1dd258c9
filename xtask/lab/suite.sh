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
    "$program" --test-threads=1 --show-output $filter > /tmp/$name.log 2>&1
    code=$?
    sed -n "s/^test \(.*\) \.\.\. ok\$/PASS $name \1/p; s/^test \(.*\) \.\.\. FAILED\$/FAIL $name \1/p" \
        /tmp/$name.log
    if [ $code -ne 0 ]; then
        bad=1
        cat /tmp/$name.log
    else
        grep '^figure ' /tmp/$name.log
    fi
    cp /tmp/$name.log /out/
done
exit $bad
