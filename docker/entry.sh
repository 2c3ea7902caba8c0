#!/bin/sh
# PID 1 of both images: files that the group may write (volumes are shared through fsGroup), zombies reaped, signals passed on.
umask 002
exec tini -- "$@"
