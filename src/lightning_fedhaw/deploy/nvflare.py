"""Deployment on NVFlare's Collab API, in its simulator or between provisioned sites.

``nvflare`` is imported when these functions are called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from lightning_fedhaw.deploy.client_side import ClientSide
from lightning_fedhaw.deploy.engines import engine_module
from lightning_fedhaw.deploy.messages import Message
from lightning_fedhaw.deploy.server_side import ServerSide
from lightning_fedhaw.deploy.sites import Sites, Task

__all__ = ["collab_functions", "collab_recipe"]

SYNC_SECONDS = 600
"""Seconds in which the sites have to be ready for a job."""

MakeSite = Callable[[str], ClientSide]
MakeServer = Callable[[Sites], ServerSide]


class CollabSites:
    """The clients of an NVFlare job as sites; a site's identity is the name in its certificate.

    Args:
        clients: The proxies of the clients, ``collab.clients``.
    """

    def __init__(self, clients: Any) -> None:
        self._proxies = {proxy.name: proxy for proxy in clients}

    def present(self) -> dict[str, str]:
        """Return the names of the clients of the job."""
        return {name: name for name in self._proxies}

    def ask(self, task: Task, messages: Mapping[str, Message], timeout: float) -> Iterator[tuple[str, Message]]:
        """Call all clients at once, and yield the replies in the order of the messages."""
        if not messages:
            return
        with ThreadPoolExecutor(len(messages)) as pool:
            calls = {}
            for name, message in messages.items():
                calls[name] = pool.submit(self._call, name, task, message, timeout)
            for name in messages:
                yield name, calls.pop(name).result()

    def _call(self, name: str, task: Task, message: Message, timeout: float) -> Message:
        """Call one client; an error of the engine's becomes the reply."""
        try:
            reply = self._proxies[name](timeout=timeout).answer(
                task=task, arrays=dict(message.arrays), text=message.text
            )
            return Message(reply["arrays"], reply["text"], reply["error"])
        except Exception as error:  # whatever the engine raises when a site is gone: it is left out by its name
            return Message(error=f"NVFlare says: {error}")


def collab_functions(make_server: MakeServer, make_site: MakeSite) -> tuple[Any, Any]:
    """Make the two functions of a federation's module that NVFlare calls.

    Assign them in the module that is given to :func:`collab_recipe`: ``main, answer = collab_functions(...)``.

    Args:
        make_server: ``make_server(sites)`` makes the server side.
        make_site: ``make_site(name)`` makes the client side of the site with this name.

    Returns:
        The server's main function, and the function ``answer`` of the clients.

    Raises:
        ImportError: If ``nvflare`` is not installed, or in a version that was not tried.
    """
    collab = engine_module("nvflare.collab").collab
    sites: dict[str, ClientSide] = {}
    memories: dict[str, bytes] = {}
    lock = threading.Lock()

    @collab.main  # type: ignore[untyped-decorator]
    def main() -> None:
        make_server(CollabSites(collab.clients)).fit()

    @collab.publish  # type: ignore[untyped-decorator]
    def answer(task: str, arrays: dict[str, Any], text: str) -> dict[str, Any]:
        name = collab.site_name
        # One message at a time: training uses the global random states.
        with lock:
            if name not in sites:
                sites[name] = make_site(name)
            reply, memory = sites[name].answer(task, Message(arrays, text), memories.get(name))
            if memory is not None:
                memories[name] = memory
        return {"arrays": dict(reply.arrays), "text": reply.text, "error": reply.error}

    return main, answer


def collab_recipe(name: str, federation: ModuleType, min_sites: int, **settings: Any) -> Any:
    """Make the recipe of a job, to run it in NVFlare's simulator or to submit it to a provisioned server.

    Args:
        name: The name of the job.
        federation: A module with the functions of :func:`collab_functions`. It has to import everything that it needs
            from installed packages: NVFlare sends this one file.
        min_sites: Sites without which NVFlare does not start the job, and ends it. With fewer than all of them, a job
            goes on without a site that has died; submit it once all are connected.
        settings: Further arguments of ``nvflare.collab.CollabRecipe``.

    Returns:
        The recipe: ``recipe.execute(SimEnv(num_clients=3))``.

    Raises:
        ImportError: If ``nvflare`` is not installed, or in a version that was not tried.
    """
    recipe = engine_module("nvflare.collab").CollabRecipe
    # The first thing that a site does is to import PyTorch, which may take longer than NVFlare's default of a minute.
    arguments = {"sync_task_timeout": SYNC_SECONDS, **settings}
    return recipe(name, server=federation, client=federation, min_clients=min_sites, **arguments)
