#!/bin/sh
echo its last words
exit 9
