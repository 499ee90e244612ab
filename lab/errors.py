"""What stops a command of the lab."""

from storage import Stop


class LabError(Stop):
    """The lab refuses; the reason says what to do."""
