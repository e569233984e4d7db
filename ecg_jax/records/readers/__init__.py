"""Files -> `Reading`: the samples as they lie on disk, leads ordered, unit settled. A module per format.

Readers repair nothing, filter nothing and know no labels. Invariant: whatever is wrong with a recording's files becomes
a `Refused` naming the file, never another exception; a sample that the file does not have is NaN, never a number.
"""
