package browsertest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// phone is a browser profile of its own, with the page open in one tab.
type phone struct {
	t   *testing.T
	d   *deployment
	ctx context.Context

	mu     sync.Mutex
	faults []string // what the browser's console complains of
}

// newPhone opens the page in a fresh profile, after these scripts.
func (d *deployment) newPhone(scripts ...string) *phone {
	d.t.Helper()
	ctx, cancel := chromedp.NewContext(browser, chromedp.WithNewBrowserContext())
	d.t.Cleanup(cancel)
	p := &phone{t: d.t, d: d, ctx: ctx}
	p.prepare(scripts...)
	p.open()
	return p
}

// tab is another tab of the same profile.
func (p *phone) tab() *phone {
	p.t.Helper()
	ctx, cancel := chromedp.NewContext(p.ctx)
	p.t.Cleanup(cancel)
	other := &phone{t: p.t, d: p.d, ctx: ctx}
	other.prepare()
	other.open()
	return other
}

func (p *phone) prepare(scripts ...string) {
	p.t.Helper()
	err := chromedp.Listen(p.ctx, func(event any) {
		p.mu.Lock()
		defer p.mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			p.faults = append(p.faults, e.ExceptionDetails.Text+" "+exceptionText(e.ExceptionDetails.Exception))
		case *runtime.EventConsoleAPICalled:
			if e.Type == runtime.ConsoleAPICalledTypeError {
				for _, a := range e.Args {
					p.faults = append(p.faults, string(a.Value)+a.Description)
				}
			}
		}
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.do(narrow)
	call(p, emulation.SetFocusEmulationEnabled, emulation.SetFocusEmulationEnabledParams{Enabled: true}) // one browser has many
	call(p, emulation.SetLocaleOverride, emulation.SetLocaleOverrideParams{Locale: "en-GB"})
	call(p, emulation.SetTimezoneOverride, emulation.SetTimezoneOverrideParams{TimezoneID: "UTC"})
	for _, s := range scripts {
		call(p, page.AddScriptToEvaluateOnNewDocument, page.AddScriptToEvaluateOnNewDocumentParams{Source: s})
	}
	p.t.Cleanup(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.faults) > 0 {
			p.t.Errorf("the page's console: %q", p.faults)
		}
	})
}

// call sends a command of the browser's protocol.
func call[P, R any](p *phone, command cdp.Command[P, R], params P) R {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	result, err := chromedp.Run(ctx, func(ctx context.Context, t *chromedp.Target) (R, error) {
		return cdp.Call(ctx, t, command, params)
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return result
}

func (p *phone) open() {
	p.t.Helper()
	p.do(chromedp.Navigate(p.d.url))
	p.until("the page is open", `document.querySelector("[data-screen]:not([hidden])")?.dataset.screen !== "loading"`)
}

// reload loads the page anew where it is.
func (p *phone) reload() {
	p.t.Helper()
	eval[chromedp.Void](p, `void setTimeout(() => location.reload())`)
	p.until("the page is loaded anew", `performance.getEntriesByType("navigation")[0].type === "reload" && `+shown+` !== "loading"`)
}

func (p *phone) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		p.t.Fatal(err)
	}
}

// eval evaluates JavaScript, and waits if it is a promise.
func eval[T any](p *phone, js string) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](js, chromedp.EvalAwaitPromise))
	if err != nil {
		p.t.Fatalf("%s: %v", js, err)
	}
	return v
}

func (p *phone) text(js string) string {
	p.t.Helper()
	return eval[string](p, js)
}

// until waits until an expression holds.
func (p *phone) until(what, js string) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(30 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(p.ctx, patience)
		holds, err := chromedp.Run(ctx, chromedp.Evaluate[bool]("Boolean("+js+")"))
		cancel()
		if err == nil && holds {
			return
		}
		if time.Now().After(deadline) {
			p.shoot("failed")
			p.t.Fatalf("waited %v in vain: %s (%v); the page:\n%s", patience, what, err, p.text("document.body.innerText"))
		}
	}
}

const shown = `document.querySelector("[data-screen]:not([hidden])").dataset.screen`

// at waits for a screen, and for its heading to have the focus.
func (p *phone) at(screen string) {
	p.t.Helper()
	p.until("the screen "+screen, fmt.Sprintf(`%s === %q && !document.querySelector("dialog[open]")`, shown, screen))
}

// says waits until the page says something, to everybody: in an alert or a status.
func (p *phone) says(words string) {
	p.t.Helper()
	p.until(fmt.Sprintf("it says %q", words), fmt.Sprintf(
		`[...document.querySelectorAll("[role=alert], [role=status]")].some((e) => e.checkVisibility() && e.innerText.includes(%q))`, words))
}

// goes to a screen as a link would.
func (p *phone) goes(route string) {
	p.t.Helper()
	eval[chromedp.Void](p, fmt.Sprintf(`void (location.hash = "#/%s")`, route))
	p.at(route)
}

// -- by keyboard alone

// focused is the name of what has the focus, as the page words it.
const focused = `(() => { const e = document.activeElement;
	return (e.labels?.[0]?.textContent ?? e.getAttribute("aria-label") ?? e.querySelector("span")?.textContent ?? e.textContent).trim(); })()`

// tabTo presses Tab until something of this name has the focus.
func (p *phone) tabTo(name string) {
	p.t.Helper()
	var seen []string
	for range 60 {
		got := p.text(focused)
		if got == name && p.text(`document.activeElement.tagName`) != "H1" {
			return
		}
		seen = append(seen, got)
		p.do(chromedp.KeyEvent(kb.Tab))
	}
	p.shoot("failed")
	p.t.Fatalf("Tab does not reach %q; it passes %q", name, seen)
}

// press goes to a link or button, and presses Enter.
func (p *phone) press(name string) {
	p.t.Helper()
	p.tabTo(name)
	p.do(chromedp.KeyEvent(kb.Enter))
}

// types goes to a field, and types.
func (p *phone) types(label, value string) {
	p.t.Helper()
	p.tabTo(label)
	eval[chromedp.Void](p, `document.activeElement.select()`)
	call(p, input.InsertText, input.InsertTextParams{Text: value})
}

func (p *phone) ticks(label string) {
	p.t.Helper()
	p.tabTo(label)
	p.do(chromedp.KeyEvent(" "))
}

func (p *phone) signUp(name string) {
	p.t.Helper()
	p.at("sign-in")
	p.types("Name", name)
	p.types("Account password", accountPassword)
	p.press("Create an account")
	p.at("chats")
}

func (p *phone) signIn(name string) {
	p.t.Helper()
	p.at("sign-in")
	p.types("Name", name)
	p.types("Account password", accountPassword)
	p.press("Sign in")
}

// writes sends a message.
func (p *phone) writes(to, words string) {
	p.t.Helper()
	p.goes("chats")
	p.types("Write to", to)
	p.press("Open chat")
	p.at("chat")
	p.types("Message", words)
	p.do(chromedp.KeyEvent(kb.Enter))
	p.sees(words)
}

// sees waits for a message in the chat that is open.
func (p *phone) sees(words string) {
	p.t.Helper()
	p.until(fmt.Sprintf("the message %q", words), fmt.Sprintf(`document.getElementById("messages").innerText.includes(%q)`, words))
}

// reads opens a chat, and waits for a message in it.
func (p *phone) reads(peer, words string) {
	p.t.Helper()
	p.goes("chats")
	p.press(peer)
	p.sees(words)
}

// alice is the phone of a user who has written to bob.
func (d *deployment) alice() *phone {
	d.t.Helper()
	d.newPhone().signUp("bob")
	p := d.newPhone()
	p.signUp("alice")
	p.writes("bob", secretMessage)
	return p
}

// sets types a new password twice, and presses a button.
func (p *phone) sets(password, button string) {
	p.t.Helper()
	p.types("New backup password", password)
	p.types("The same password again", password)
	p.press(button)
}

// turnsOn turns backup on with a password.
func (p *phone) turnsOn(password string) {
	p.t.Helper()
	p.goes("backup/password")
	p.sets(password, "Turn on")
	p.at("backup")
	p.says("End-to-end encrypted backup is on")
}

// toRestore is a new phone of this user's, which asks for the backup password.
func (d *deployment) toRestore(name string) *phone {
	d.t.Helper()
	p := d.newPhone()
	p.signIn(name)
	p.at("restore")
	p.press("Enter your backup password")
	p.at("restore/password")
	return p
}

// has waits until the screen says how many tries are left.
func (p *phone) has(triesLeft string) {
	p.t.Helper()
	p.until(triesLeft, fmt.Sprintf(`document.getElementById("attempts").innerText.includes(%q)`, triesLeft))
}

// tries enters a backup password.
func (p *phone) tries(password string) {
	p.t.Helper()
	p.types("Backup password", password)
	p.press("Restore")
}

// restores enters the right one.
func (p *phone) restores(password string) {
	p.t.Helper()
	p.tries(password)
	p.at("restore/done")
}

// -- what is looked at

var (
	narrow = size(390, 844, 1, true)
	wide   = size(1280, 800, 1, false)
)

func size(width, height int64, scale float64, mobile bool) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
			Width: width, Height: height, DeviceScaleFactor: scale, Mobile: mobile,
		})
		return err
	})
}

func scheme(name string) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: name}},
		})
		return err
	})
}

// look examines what is shown, at both widths and in both schemes: nothing runs out of the
// page, all text has contrast, and its accessibility tree is the one in testdata.
func (p *phone) look(name string) {
	p.t.Helper()
	p.tree(name)
	for _, width := range []struct {
		name string
		set  chromedp.Action[chromedp.Void]
	}{{"desk", wide}, {"phone", narrow}} {
		for _, colours := range []string{"dark", "light"} {
			p.do(width.set, scheme(colours))
			p.shoot(name + "-" + width.name + "-" + colours)
			for _, f := range eval[[]string](p, examine) {
				p.t.Errorf("%s, %s, %s: %s", name, width.name, colours, f)
			}
		}
	}
}

func (p *phone) shoot(name string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	if err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(screenshots, strings.ReplaceAll(name, "/", "-")+".png"), png, 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// examine lists texts and controls without contrast (WCAG 2.2, 1.4.3 and 1.4.11), targets that
// are too small for a finger (2.5.8), and what runs out of the page (1.4.10).
const examine = `(() => {
	const faults = [];
	const parse = (c) => { const m = c.match(/[\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
	const luminance = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
		return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
	const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
	const behind = (e) => {
		const layers = [];
		for (let n = e; n; n = n.parentElement) {
			layers.push(parse(getComputedStyle(n).backgroundColor));
			if (layers.at(-1)[3] === 1) break;
		}
		return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
	};
	const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
	const top = document.querySelector("dialog[open]") ?? document.body;
	let texts = 0;
	for (const e of top.querySelectorAll("*")) {
		if (!e.checkVisibility() || e.closest(".who, .skip")) continue;
		const style = getComputedStyle(e);
		if ([...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) {
			texts++;
			const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
			const ratio = contrast(over(parse(style.color), behind(e)), behind(e));
			if (ratio < (large ? 3 : 4.5)) faults.push("contrast " + ratio.toFixed(2) + " of " + e.tagName + " " + e.textContent.trim().slice(0, 40));
		}
		if (e.matches("input, textarea")) {
			const edge = contrast(over(parse(style.borderTopColor), behind(e.parentElement)), behind(e.parentElement));
			if (edge < 3 && e.type !== "checkbox") faults.push("contrast " + edge.toFixed(2) + " of the edge of " + e.id);
		}
		if (e.matches("button, a.button, nav a, .list a, input")) {
			const box = e.getBoundingClientRect();
			if (e.type !== "checkbox" && Math.min(box.width, box.height) < 44) faults.push("only " + Math.round(box.width) + " by " + Math.round(box.height) + ": " + (e.id || e.textContent.trim().slice(0, 40)));
		}
	}
	if (texts < 2) faults.push("there is hardly a text, so that this says nothing");
	if (document.documentElement.scrollWidth > innerWidth) faults.push("it is " + document.documentElement.scrollWidth + " pixels wide, and the page " + innerWidth);
	const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
	for (const id of new Set(ids)) if (ids.filter((i) => i === id).length > 1) faults.push("the id " + id + " is there twice");
	return faults;
})()`

// tree compares the accessibility tree, as a screen reader gets it, with the one in testdata: roles,
// names, states and order. What differs in each run is masked.
func (p *phone) tree(name string) {
	p.t.Helper()
	nodes := call(p, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{}).Nodes
	got := mask(strings.ReplaceAll(outline(nodes), p.d.url, "URL"))
	file := filepath.Join("testdata", "trees", strings.ReplaceAll(name, "/", "-")+".txt")
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			p.t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			p.t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		p.t.Fatalf("%v; go test -update writes it", err)
	}
	if got != string(want) {
		p.t.Errorf("the accessibility tree of %s is\n%s\nand should be\n%s\n(go test -update writes it anew)", name, got, want)
	}
}

// outline writes a tree with one line for each node that a screen reader stops at or names.
func outline(nodes []*accessibility.Node) string {
	byID := map[accessibility.NodeID]*accessibility.Node{}
	for _, n := range nodes {
		byID[n.NodeID] = n
	}
	var out strings.Builder
	var walk func(n *accessibility.Node, depth int)
	walk = func(n *accessibility.Node, depth int) {
		role := value(n.Role)
		silent := n.Ignored || role == "none" || role == "generic" || role == "InlineTextBox" || role == "ListMarker" ||
			role == "LayoutTable" || role == "LabelText"
		if !silent && role == "StaticText" {
			// A text that is its parent's name is said once.
			if parent := byID[n.ParentID]; parent != nil && strings.Contains(value(parent.Name), value(n.Name)) {
				silent = true
			}
		}
		if !silent {
			fmt.Fprintf(&out, "%s%s", strings.Repeat("  ", depth), role)
			if name := value(n.Name); name != "" {
				fmt.Fprintf(&out, " %q", name)
			}
			if d := value(n.Description); d != "" {
				fmt.Fprintf(&out, " (%s)", d)
			}
			for _, property := range n.Properties {
				v := value(property.Value)
				switch property.Name {
				case "focused", "invalid", "required", "checked", "pressed", "live", "level", "modal", "disabled", "expanded":
					if v != "" && v != "false" && v != "off" {
						fmt.Fprintf(&out, " %s=%s", property.Name, v)
					}
				}
			}
			out.WriteByte('\n')
			depth++
		}
		for _, id := range n.ChildIDs {
			if child := byID[id]; child != nil {
				walk(child, depth)
			}
		}
	}
	if len(nodes) > 0 {
		walk(nodes[0], 0)
	}
	return out.String()
}

func value(v *accessibility.Value) string {
	if v == nil || len(v.Value) == 0 {
		return ""
	}
	var text string
	if json.Unmarshal(v.Value, &text) == nil {
		return text
	}
	return string(v.Value)
}

func exceptionText(o *runtime.RemoteObject) string {
	if o == nil {
		return ""
	}
	return o.Description
}
