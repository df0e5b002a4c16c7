"""A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C: undo that, since
some tests press it."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
