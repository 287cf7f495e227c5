"""Why a plan is as it is: worked out, in words, as a page."""
