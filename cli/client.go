package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// answerTime is how long one endpoint may take to answer before the next is tried.
const answerTime = 2 * time.Second

// target returns what gRPC calls the endpoint.
func target(endpoint string) (string, error) {
	if path, ok := strings.CutPrefix(endpoint, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return "", fmt.Errorf("endpoint %q has no absolute path: unix:///path", endpoint)
		}
		return endpoint, nil
	}
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil || host == "" || port == "" {
		return "", fmt.Errorf("endpoint %q is neither unix:///path nor host:port", endpoint)
	}
	return "dns:///" + endpoint, nil
}

// connect returns a connection to the first endpoint that answers.
func (c *command) connect(ctx context.Context) (*grpc.ClientConn, error) {
	overTCP := insecure.NewCredentials()
	if c.ca != "" {
		var err error
		if overTCP, err = c.tls(); err != nil {
			return nil, &failure{status: exitFailed, what: err.Error(), hint: "check --ca, --cert and --key"}
		}
	}
	var tried []string
	for _, endpoint := range c.endpoints {
		conn, err := dial(endpoint, overTCP)
		if err != nil {
			return nil, &failure{status: exitFailed, what: err.Error(), hint: "check --endpoint"}
		}
		if err := ask(ctx, conn); err != nil {
			_ = conn.Close()
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil, &failure{status: exitFailed, what: "interrupted", hint: "nothing was ordered"}
			}
			tried = append(tried, endpoint+": "+brief(err))
			continue
		}
		return conn, nil
	}
	return nil, &failure{
		status: exitUnreachable,
		what:   "no agent answers: " + strings.Join(tried, ", "),
		hint:   c.unreachableHint(strings.Join(tried, " ")),
	}
}

func dial(endpoint string, overTCP credentials.TransportCredentials) (*grpc.ClientConn, error) {
	name, err := target(endpoint)
	if err != nil {
		return nil, err
	}
	transport := overTCP
	if strings.HasPrefix(endpoint, "unix:") {
		transport = insecure.NewCredentials()
	}
	return grpc.NewClient(name,
		grpc.WithTransportCredentials(transport),
		// Members are reached directly: HTTPS_PROXY is meant for the world outside.
		grpc.WithNoProxy(),
		// So that a watch notices a member that has lost its power.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	)
}

// ask finds out whether an agent answers; any answer will do, a refusal too.
func ask(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	_, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{})
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return err
	}
	return nil
}

func (c *command) tls() (credentials.TransportCredentials, error) {
	ca, err := os.ReadFile(c.ca)
	if err != nil {
		return nil, fmt.Errorf("reading the CA certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("reading the CA certificate: %s holds no certificate in PEM form", c.ca)
	}
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return nil, fmt.Errorf("reading the own certificate: %w", err)
	}
	return credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		RootCAs:      roots,
		Certificates: []tls.Certificate{pair},
	}), nil
}

// brief leaves out of a connection's error what gRPC wraps around it.
func brief(err error) string {
	message := status.Convert(err).Message()
	if status.Code(err) == codes.DeadlineExceeded {
		return "no answer in time"
	}
	if _, inner, ok := strings.Cut(message, `desc = "`); ok {
		message = strings.TrimSuffix(inner, `"`)
	}
	for _, prefix := range []string{"transport: ", "Error while dialing: "} {
		message = strings.TrimPrefix(message, prefix)
	}
	return message
}

func (c *command) unreachableHint(tried string) string {
	switch {
	case strings.Contains(tried, "permission denied"):
		return "run it as root or in the group of the socket, or name another member with --endpoint"
	case strings.Contains(tried, "tls: ") || strings.Contains(tried, "x509: "):
		return "check that --ca, --cert and --key belong to this mesh and have not expired"
	case strings.Contains(tried, "server preface") && c.ca == "":
		return "the agent may want TLS: give --ca, --cert and --key"
	}
	return "start hameshd, or name another member with --endpoint"
}

// hints say what to do about the reasons that agents give.
var hints = map[string]string{
	"VIP_UNKNOWN":        "hactl status lists the VIPs",
	"NODE_UNKNOWN":       "hactl status lists the nodes",
	"NODE_NOT_ELIGIBLE":  "hactl status says why; choose another node, or leave --to out",
	"NO_OTHER_CANDIDATE": "hactl status says why no other node is eligible",
	"NO_OWNER":           "wait until a node owns it: hactl status --watch",
	"MOVE_IN_PROGRESS":   "wait for its end: hactl status --watch",
	"MOVE_FAILED":        "see where the VIP is with hactl status, then try again",
	"OWNER_UNREACHABLE":  "wait for the fail-over, or ask a member that reaches it with --endpoint",
	"STORE_UNAVAILABLE":  "hactl status says what the store lacks; try again when it answers",
	"PROXY_UNKNOWN":      "choose one of those",
	"BACKEND_UNKNOWN":    "choose one of those",
	"LAST_BACKEND":       "bring another API server up first: hactl status; or --force",
	"LAST_CANDIDATE":     "make another node eligible first: hactl status says what it lacks; or --force",
	"REQUEST_ID_INVALID": "use another request_id",
	"EVENT_ID_INVALID":   "take an id from an event",
	"ROLE_INSUFFICIENT":  "use a certificate of role operator: hactl pki issue --role operator",
	"UNIDENTIFIED":       "use a certificate of this mesh: hactl pki issue",
	"STOPPING":           "ask another member with --endpoint",
	"CRASH_UNCONFIRMED":  "set confirm",
	"MESH_NOT_HEALTHY":   "mend that first: hactl status",
	"NO_MAJORITY":        "add a member first: hactl doctor",
	"NODE_UNREACHABLE":   "ask that node itself with --endpoint",
}

// failureOf is callFailure for what may be a failure already.
func (c *command) failureOf(ctx context.Context, err error) error {
	if errors.As(err, new(*failure)) {
		return err
	}
	return c.callFailure(ctx, err)
}

// callFailure says what became of a call that failed.
func (c *command) callFailure(ctx context.Context, err error) *failure {
	st := status.Convert(err)
	failed := &failure{status: exitFailed, what: st.Message(), hint: "see the agent's log"}
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			failed.what += " [" + info.GetReason() + "]"
			if hint, known := hints[info.GetReason()]; known {
				failed.hint = hint
			}
			return failed
		}
	}
	switch {
	case st.Code() == codes.DeadlineExceeded:
		failed.what = fmt.Sprintf("the agent has not finished within %s", c.timeout)
		failed.hint = "see how far it got with hactl status, or wait longer with --timeout"
	case ctx.Err() != nil:
		failed.what = "interrupted"
		failed.hint = "what was ordered may go on: see hactl status"
	case st.Code() == codes.Unavailable:
		failed.what = "the agent went away: " + brief(err)
		failed.hint = "try again, or name another member with --endpoint"
	case st.Code() == codes.Unimplemented:
		failed.hint = "the agent is older than this hactl: update it"
	}
	return failed
}
