"""What a reader raises when a file or an annotation cannot be used: one line with the file and the reason."""

_MARK = '.errors.DataError: '  # as a traceback prints it


class DataError(ValueError):
    """A file or annotation that cannot be used. The message is complete by itself: it names the file and the reason.

    It is made from one string, so that it survives pickling; and a DataLoader, which re-raises a worker's exception by
    calling its class on "Caught ... Original Traceback ...", gets the bare message back and not the traceback.
    """

    def __init__(self, message: str = '') -> None:
        if message.startswith('Caught DataError in ') and _MARK in message:
            message = message.split(_MARK, 1)[1].rstrip()
        super().__init__(message)


def problem_list(problems: list[tuple[str, str]], what: str, advice: str, first: int = 5) -> str:
    """One message for many problems: the count, the first ones as "file: reason", and what to do."""
    shown = '; '.join(f'{file}: {reason}' for file, reason in problems[:first])
    more = f'; and {len(problems) - first} more' if len(problems) > first else ''
    return f'{what}: {len(problems)} problem{"s" if len(problems) != 1 else ""}: {shown}{more}. {advice}'
