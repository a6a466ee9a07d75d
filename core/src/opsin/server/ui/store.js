// The conversation, kept in this browser: after a reload it is there again.

const NAME = "opsin-playground";
const FORGOTTEN = "opsin-forgotten"; // a page that is left at once leaves no time to delete

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("kept");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function within(mode, work) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("kept", mode);
      const request = work(transaction.objectStore("kept"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** Where a browser keeps nothing (a private window, a full disk), the conversation is only on the page. */
const quietly = (work) => work.catch(() => undefined);

export async function load() {
  if (sessionStorage.getItem(FORGOTTEN)) await forget();
  return quietly(within("readonly", (store) => store.get("conversation")));
}

export async function save(conversation) {
  if (!conversation.turns.length) return;
  sessionStorage.removeItem(FORGOTTEN);
  await quietly(within("readwrite", (store) => store.put(conversation, "conversation")));
}

export async function forget() {
  sessionStorage.setItem(FORGOTTEN, "yes");
  await quietly(within("readwrite", (store) => store.delete("conversation")));
  sessionStorage.removeItem(FORGOTTEN);
}
