#!/bin/sh
# PID 1 of both images: makes files group-writable (volumes are shared through fsGroup), reaps zombies and forwards signals.
umask 002
exec tini -- "$@"
