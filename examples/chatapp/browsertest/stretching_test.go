package browsertest

import "testing"

// markWorker, added to the worker's script, tells the page of each request that the worker makes, and of each answer.
const markWorker = `
const marks = new BroadcastChannel("marks"), unmarked = fetch;
globalThis.fetch = async (...request) => {
	marks.postMessage("works no more");
	const answer = await unmarked(...request);
	const body = await answer.arrayBuffer();
	marks.postMessage("works");
	return new Response(body, { status: answer.status, headers: answer.headers });
};
`

// countRounds counts what the page gets done between an answer and the next request, which is when the worker
// computes: frames drawn, each with a timer behind it. A page that stretched the password itself would find
// both marks waiting in its queue afterwards, one behind the other, and get next to nothing done between them.
const countRounds = `
globalThis.most = 0;
let works = 0;
new BroadcastChannel("marks").onmessage = async ({ data }) => {
	const turn = ++works;
	if (data !== "works") return;
	for (let rounds = 1; ; rounds++) {
		await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
		if (turn !== works) return;
		if (document.getElementById("busy").open) most = Math.max(most, rounds);
	}
};
`

// While a password is stretched, which takes the processor for seconds, the page draws and answers.
func TestPageAnswersWhileStretching(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	d.front.edit.Store(new(func(path string, body []byte) []byte {
		if path == "/sdk/worker.js" {
			return append([]byte(markWorker), body...)
		}
		return body
	}))
	alice := d.newPhone(countRounds)
	alice.signUp("alice")
	alice.turnsOn(firstPassword)
	next := d.newPhone(countRounds)
	next.signIn("alice")
	next.at("restore")
	next.press("Enter your backup password")
	next.at("restore/password")
	next.restores(firstPassword)
	for name, p := range map[string]*phone{"turning on": alice, "restoring": next} {
		if most := eval[int](p, `most`); most < 5 {
			t.Errorf("%s: between an answer and the next request the page drew %d frames at most", name, most)
		}
	}
}
