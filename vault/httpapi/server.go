package httpapi

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// Config is what the public handler is made of.
type Config struct {
	// Vault does the work. Required.
	Vault *vault.Vault
	// VaultID is the vault's id, which tokens must name as their audience. Required.
	VaultID string
	// Tenants gives the tenants' keys and policies; they are cached. Required.
	Tenants Tenants
	// Limits of requests; each that is zero has its default.
	Limits Limits
	// RequestTimeout bounds the vault's work for one request; default 15 s. An
	// attempt that was counted before it ran out stays open to the same bytes.
	RequestTimeout time.Duration
	// Log gets one record for each request. Required.
	Log *slog.Logger
	// Observe hears of each request, when it has been answered, from many goroutines at once; it must
	// return at once. Default: nobody.
	Observe func(Exchange)
	// Now is the clock for tokens, limits and caches; default time.Now. Attempts and
	// delays go by the database's clock instead.
	Now func() time.Time
}

// Exchange is a request and what became of it, for Config.Observe. All of it but Tenant is of
// a few values, none of which a client chooses.
type Exchange struct {
	Route  string // the pattern, as OpenAPI has it; empty if there is no such path
	Method string // empty if it is none that any route has
	Status int    // StatusClientGone: nobody was there to receive it
	// Problem is the problem's name, without api.ProblemPrefix; empty: success.
	Problem string
	Tenant  string // empty if it was not authenticated
	Took    time.Duration
}

// DefaultRequestTimeout is Config.RequestTimeout's default.
const DefaultRequestTimeout = 15 * time.Second

// New makes the handler of the public listener. It asks neither vault nor store
// for anything yet.
func New(c Config) (http.Handler, error) {
	if c.Vault == nil || c.VaultID == "" || c.Tenants == nil || c.Log == nil {
		return nil, errors.New("the HTTP interface needs a vault, its id, the tenants and a log")
	}
	if c.RequestTimeout < 0 {
		return nil, errors.New("a request's time-out cannot be negative")
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = DefaultRequestTimeout
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	c.Limits = c.Limits.withDefaults()
	for _, l := range []RateLimit{c.Limits.RequestsPerUser, c.Limits.RequestsPerTenant, c.Limits.EnrolmentsPerUser, c.Limits.EnrolmentsPerTenant} {
		if l.PerSecond <= 0 || l.Burst < 1 {
			return nil, errors.New("a rate limit needs a rate above zero and a burst of at least one")
		}
	}
	if c.Limits.RequestsAtOnce < 1 {
		return nil, errors.New("the vault needs a place for at least one request")
	}
	s := &server{
		vault: c.Vault, log: c.Log, observe: c.Observe, timeout: c.RequestTimeout, now: c.Now,
		authority: newAuthority(&keyring{source: c.Tenants, now: c.Now, log: c.Log}, c.VaultID, c.Now),
		requests: limits{
			newLimiter[vault.AccountID](c.Limits.RequestsPerUser, "requests of this user", c.Now),
			newLimiter[string](c.Limits.RequestsPerTenant, "requests of this tenant", c.Now),
		},
		enrolments: limits{
			newLimiter[vault.AccountID](c.Limits.EnrolmentsPerUser, "enrolments were started by this user", c.Now),
			newLimiter[string](c.Limits.EnrolmentsPerTenant, "enrolments were started by this tenant", c.Now),
		},
		places:   make(places, c.Limits.RequestsAtOnce),
		router:   chi.NewRouter(),
		document: newDocument(),
		identity: identityCache{turn: make(chan struct{}, 1)},
	}
	s.identity.turn <- struct{}{}
	s.router.NotFound(s.noRoute)
	s.router.MethodNotAllowed(s.noRoute)
	s.routes()
	if err := s.serveDocument(); err != nil {
		return nil, err
	}
	return s, nil
}

// server is the public handler.
type server struct {
	vault                *vault.Vault
	log                  *slog.Logger
	observe              func(Exchange)
	timeout              time.Duration
	now                  func() time.Time
	authority            *authority
	requests, enrolments limits
	places               places
	router               *chi.Mux
	document             *huma.OpenAPI
	identity             identityCache
}

// exchange is one request and what became of it, for the log.
type exchange struct {
	id     string
	client context.Context // the request's own, without the time-out
	route  string          // the pattern, never the path: user ids stay out of the log
	tenant string
	status int
	// relayed is who sent the capsule that the request came in; nil: it came by itself.
	relayed *identity
	// inside is the request that came in the capsule, and method its method.
	inside *exchange
	method string
	// refused is what was answered instead of success.
	refused *refusal
}

type exchangeKey struct{}

func exchangeOf(ctx context.Context) *exchange { return ctx.Value(exchangeKey{}).(*exchange) }

// ServeHTTP gives each request its id and its time-out, has it answered, and logs it.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	x := &exchange{id: requestID(r.Header), client: r.Context()}
	s.commonHeader(w, x)
	x.method = r.Method
	defer func() {
		took := time.Since(began)
		s.logExchange(x.told(), took)
		if s.observe != nil {
			s.observe(x.told().observed(took))
		}
	}()
	ctx, cancel := context.WithTimeout(x.client, s.timeout)
	defer cancel()
	s.route(ctx, w, r, x)
}

// commonHeader sets what every answer has.
func (s *server) commonHeader(w http.ResponseWriter, x *exchange) {
	h := w.Header()
	h.Set("X-Request-Id", x.id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
}

// route has a request answered, whatever happens.
func (s *server) route(ctx context.Context, w http.ResponseWriter, r *http.Request, x *exchange) {
	defer func() {
		if p := recover(); p != nil {
			if p == http.ErrAbortHandler { // net/http's own way out
				panic(p)
			}
			s.log.ErrorContext(x.client, "panic", "panic", p, "stack", string(debug.Stack()), "request_id", x.id)
			if x.status == 0 {
				s.refuse(w, x, refuse(api.Internal, "the instance of this problem is the request id under which the vault logged it"))
			}
		}
	}()
	ctx = context.WithValue(ctx, exchangeKey{}, x)
	// The router sees the path as it was sent. Left alone it would see it decoded or
	// not, depending on what is in it.
	route := chi.NewRouteContext()
	route.Routes = s.router
	route.RoutePath = r.URL.EscapedPath()
	s.router.ServeHTTP(w, r.WithContext(context.WithValue(ctx, chi.RouteCtxKey, route)))
}

// told is what is said of an exchange, of a capsule that was opened what was in it.
func (x *exchange) told() *exchange {
	if x.inside != nil {
		return x.inside
	}
	return x
}

func (x *exchange) observed(took time.Duration) Exchange {
	out := Exchange{Route: x.route, Status: x.status, Tenant: x.tenant, Took: took}
	if slices.Contains(methods, x.method) {
		out.Method = x.method
	}
	if r := x.refused; r != nil {
		out.Problem = strings.TrimPrefix(r.problem.Type, api.ProblemPrefix)
		if r.gone {
			out.Status = StatusClientGone
		}
	}
	return out
}

// methods are those that any route has.
var methods = []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete}

func (s *server) logExchange(x *exchange, took time.Duration) {
	level, status := slog.LevelInfo, x.status
	attrs := []slog.Attr{
		slog.String("route", x.route), slog.String("request_id", x.id), slog.Duration("duration", took),
	}
	if x.relayed != nil {
		attrs = append(attrs, slog.Bool("relayed", true))
	}
	if len(x.method) <= len(http.MethodOptions) { // any text can be a method
		attrs = append(attrs, slog.String("method", x.method))
	}
	if x.tenant != "" {
		attrs = append(attrs, slog.String("tenant", x.tenant))
	}
	if r := x.refused; r != nil {
		attrs = append(attrs, slog.String("problem", strings.TrimPrefix(r.problem.Type, api.ProblemPrefix)))
		switch {
		case r.gone:
			status = StatusClientGone
		case status >= http.StatusInternalServerError:
			if level = slog.LevelError; status == http.StatusServiceUnavailable {
				level = slog.LevelWarn
			}
			if r.cause != nil {
				attrs = append(attrs, slog.Any("error", r.cause))
			}
		}
	}
	s.log.LogAttrs(x.client, level, "request", append(attrs, slog.Int("status", status))...)
}

// answerTimeout bounds the sending of an answer to a client that does not read: it has room in the
// buffers on the way, and is late only if many are sent before it and none is read.
const answerTimeout = 5 * time.Second

// StatusClientGone is logged for a request whose client left before the answer; nobody
// receives it.
const StatusClientGone = 499

// answer writes a success. It is marshalled before anything is written.
func (s *server) answer(w http.ResponseWriter, x *exchange, out any) {
	body, err := json.Marshal(out)
	if err != nil {
		s.refuse(w, x, refusalOf(x.client, err))
		return
	}
	write(w, x, http.StatusOK, "application/json", body)
}

func write(w http.ResponseWriter, x *exchange, status int, mediaType string, body []byte) {
	x.status = status
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	// The connection's own bound on writing has to include the vault's work. Where there is no connection there is nothing to bound.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTimeout))
	w.WriteHeader(status)
	w.Write(body) // who cannot receive it cannot be told
}

// noRoute answers for paths that are not there, and for methods that a path does not have.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) {
	x := exchangeOf(r.Context())
	var allowed []string
	for _, method := range methods {
		if pattern := s.router.Find(chi.NewRouteContext(), method, r.URL.EscapedPath()); pattern != "" {
			allowed = append(allowed, method)
			x.route = pattern
		}
	}
	if len(allowed) == 0 {
		s.refuse(w, x, refuse(api.NotFound, "there is no such path; /openapi.json lists those that are"))
		return
	}
	refused := refuse(api.MethodNotAllowed, "the header Allow lists the methods of this path")
	refused.header.Set("Allow", strings.Join(allowed, ", "))
	s.refuse(w, x, refused)
}

// maxRequestIDBytes bounds a request id that a client gives.
const maxRequestIDBytes = 64

// requestID is the client's, if it has a sane shape, or a new one.
func requestID(h http.Header) string {
	given := h.Get("X-Request-Id")
	if len(given) == 0 || len(given) > maxRequestIDBytes {
		return rand.Text()
	}
	for _, c := range []byte(given) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '_' && c != '-' {
			return rand.Text()
		}
	}
	return given
}
